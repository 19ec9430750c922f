/*
 * witness: what runs in the test guest, and says BAD as soon as its memory and its disks are not of one instant.
 *
 *   witness PORT DISKS TICK_MS
 *
 * Once a tick a counter goes up in memory (COPIES of it, far apart) and then, past the guest's cache and flushed, in the
 * file "counter" on each of the DISKS, one after another. Before that, all of them are read back and must be equal. So
 * at every instant of the guest its memory tells what must be on the disks.
 *
 * Each place has the last SLOTS values, value n in slot n % SLOTS, and all of them are compared. With one value alone, a
 * machine that was put together from parts of different instants, in the middle of a tick, would write over the
 * difference without having looked; this way it is found at the next tick, for certain.
 *
 * After a boot there is no memory to compare with. Then the disks' counters must not rise from one disk to the next, and
 * the first may be ahead of the last by one at most: what a crash leaves of a tick.
 *
 * On PORT (a virtio-serial port) it writes lines:
 *   READY disks=N counters=A,B,...    once after each boot, before the first tick
 *   T COUNTER                         each tick; left out where the host does not read
 *   BAD ..., ERR ...                  what must not be; kept until the host reads it
 *   R ID ok ... or R ID error ...     the answer to a command
 * and reads commands, "ID COMMAND ARGUMENTS"; see run().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;

enum { MAX_DISKS = 8, BLOCK = 4096, WORDS = BLOCK / 8, COPIES = 32, STRIDE = 256 << 10 };
enum { SLOTS = 8, RING = SLOTS * BLOCK };
enum { PENDING = 512 << 10, SHELL_OUTPUT = 96 << 10, MAX_BLOCKS = 16384 };

static int port, disks;

static u64 now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void nap_ns(u64 ns)
{
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    nanosleep(&t, 0);
}

static u64 mix(u64 x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void *aligned(size_t size)
{
    void *memory;
    if (posix_memalign(&memory, BLOCK, size)) {
        dprintf(2, "WITNESS: out of memory\n");
        exit(1);
    }
    memset(memory, 0, size);
    return memory;
}

/* ---- lines to the host ---- */

static pthread_mutex_t out_lock = PTHREAD_MUTEX_INITIALIZER;
static char pending[PENDING];
static size_t pending_size;

/* Writes what is kept, as far as the port takes it. With out_lock. */
static void flush_pending(void)
{
    while (pending_size) {
        ssize_t n = write(port, pending, pending_size < 32768 ? pending_size : 32768);
        if (n <= 0)
            return;
        memmove(pending, pending + n, pending_size - n);
        pending_size -= n;
    }
}

/* Lines that must arrive are kept while nobody reads; others are dropped then. */
static void put(int must, const char *line, size_t size)
{
    pthread_mutex_lock(&out_lock);
    flush_pending();
    if ((must || !pending_size) && pending_size + size <= PENDING) {
        ssize_t n = pending_size ? 0 : write(port, line, size);
        if (n < 0)
            n = 0;
        /* The rest of a line that was begun is always kept: half a line would be none at all. */
        if ((must || n > 0) && (size_t)n < size) {
            memcpy(pending + pending_size, line + n, size - n);
            pending_size += size - n;
        }
    }
    pthread_mutex_unlock(&out_lock);
}

static void say(int must, const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (n > (int)sizeof line - 2)
        n = sizeof line - 2;
    line[n++] = '\n';
    put(must, line, n);
}

/* ---- the counter ---- */

static int counter_file[MAX_DISKS];
static volatile u64 *ram; /* COPIES times SLOTS words, STRIDE bytes apart */
static volatile u64 tick_ns, ticks, bad, gap_ns;
static volatile int hold, held;

static volatile u64 *copy(int i)
{
    return ram + (u64)i * (STRIDE / 8);
}

/* What a slot holds when the counter is there: the last value that belongs into it. */
static u64 in_slot(int slot, u64 counter)
{
    return counter - (counter - slot) % SLOTS;
}

/* The counter on a disk; all ones where the ring does not hold what one counter leaves. */
static u64 read_counter(int disk, u64 *ring)
{
    u64 counter = 0;
    if (pread(counter_file[disk], ring, RING, 0) != RING) {
        say(1, "ERR reading the counter of disk %d: %s", disk, strerror(errno));
        return ~0ull;
    }
    for (int slot = 0; slot < SLOTS; slot++)
        if (ring[slot * WORDS] > counter)
            counter = ring[slot * WORDS];
    for (int slot = 0; slot < SLOTS; slot++) {
        u64 want = in_slot(slot, counter);
        for (int k = 0; k < WORDS; k++)
            if (ring[slot * WORDS + k] != want)
                return ~0ull;
    }
    return counter;
}

/* Writes the slot of a value. */
static void write_counter(int disk, u64 *block, u64 value)
{
    for (int k = 0; k < WORDS; k++)
        block[k] = value;
    if (pwrite(counter_file[disk], block, BLOCK, value % SLOTS * BLOCK) != BLOCK)
        say(1, "ERR writing the counter of disk %d: %s", disk, strerror(errno));
}

/* Writes all slots, as they are when the counter is there. */
static void write_ring(int disk, u64 *ring, u64 counter)
{
    for (int slot = 0; slot < SLOTS; slot++)
        for (int k = 0; k < WORDS; k++)
            ring[slot * WORDS + k] = in_slot(slot, counter);
    if (pwrite(counter_file[disk], ring, RING, 0) != RING)
        say(1, "ERR writing the counter of disk %d: %s", disk, strerror(errno));
}

/* Whether a copy in memory is what this counter leaves. */
static int copy_differs(int i, u64 counter)
{
    int differs = 0;
    for (int slot = 0; slot < SLOTS; slot++)
        differs |= copy(i)[slot] != in_slot(slot, counter);
    return differs;
}

static void write_copies(u64 counter)
{
    for (int i = 0; i < COPIES; i++)
        for (int slot = 0; slot < SLOTS; slot++)
            copy(i)[slot] = in_slot(slot, counter);
}

static void counters_to_text(char *text, size_t size, const u64 *found)
{
    size_t n = 0;
    text[0] = 0;
    for (int d = 0; d < disks && n < size; d++)
        n += snprintf(text + n, size - n, "%s%lld", d ? "," : "", (long long)found[d]);
}

static void *tick(void *unused)
{
    u64 *ring = aligned(RING), last = now_ns();
    (void)unused;
    for (;;) {
        u64 found[MAX_DISKS], counter;
        int differs = 0, copies = 0;
        for (; hold; nap_ns(20000000))
            held = 1;
        held = 0;
        counter = ticks;
        for (int d = 0; d < disks; d++) {
            found[d] = read_counter(d, ring);
            differs |= found[d] != counter;
        }
        for (int i = 0; i < COPIES; i++)
            copies += copy_differs(i, counter);
        if (differs || copies) {
            char text[256];
            counters_to_text(text, sizeof text, found);
            bad++;
            say(1, "BAD memory=%llu copies-that-differ=%d disks=%s", (unsigned long long)counter, copies, text);
            /* Said once: from here on they are equal. */
            write_copies(counter);
            for (int d = 0; d < disks; d++)
                write_ring(d, ring, counter);
        }
        counter++;
        for (int i = 0; i < COPIES; i++)
            copy(i)[counter % SLOTS] = counter;
        for (int d = 0; d < disks; d++)
            write_counter(d, ring, counter);
        ticks = counter;
        say(0, "T %llu", (unsigned long long)counter);
        u64 now = now_ns();
        if (now - last > gap_ns)
            gap_ns = now - last;
        last = now;
        nap_ns(tick_ns);
    }
    return 0;
}

static int open_direct(const char *path)
{
    int file = open(path, O_RDWR | O_CREAT | O_DIRECT | O_DSYNC | O_CLOEXEC, 0644);
    if (file < 0)
        say(1, "ERR opening %s: %s", path, strerror(errno));
    return file;
}

/* Opens the counters, makes them where they are not, and judges what a crash has left. */
static void start_counter(void)
{
    u64 found[MAX_DISKS] = {0}, *ring = aligned(RING), highest = SLOTS;
    char text[256];
    int made = 0;
    for (int d = 0; d < disks; d++) {
        char path[64];
        struct stat about;
        snprintf(path, sizeof path, "/vd%c/counter", 'a' + d);
        counter_file[d] = open_direct(path);
        if (fstat(counter_file[d], &about) == 0 && about.st_size < RING) {
            write_ring(d, ring, SLOTS);
            fsync(counter_file[d]);
            made++;
        }
        found[d] = read_counter(d, ring);
        if (found[d] != ~0ull && found[d] > highest)
            highest = found[d];
    }
    counters_to_text(text, sizeof text, found);
    int wrong = made && made < disks;
    for (int d = 0; d < disks; d++)
        wrong |= found[d] == ~0ull || (d && found[d] > found[d - 1]) || found[0] - found[d] > 1;
    if (wrong) {
        bad++;
        say(1, "BAD after a boot disks=%s new=%d", text, made);
    }
    ram = mmap(0, (size_t)COPIES * STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    write_copies(highest);
    for (int d = 0; d < disks; d++)
        if (found[d] != highest)
            write_ring(d, ring, highest);
    ticks = highest;
    free(ring);
    say(1, "READY disks=%d counters=%s", disks, text);
}

/* Where the counter's ring is on its disk, in bytes. */
static long long counter_offset(int disk)
{
    struct {
        struct fiemap map;
        struct fiemap_extent extent;
    } ask = {.map = {.fm_length = RING, .fm_flags = FIEMAP_FLAG_SYNC, .fm_extent_count = 1}};
    if (disk < 0 || disk >= disks || ioctl(counter_file[disk], FS_IOC_FIEMAP, &ask) || ask.map.fm_mapped_extents != 1 ||
        ask.extent.fe_length < RING)
        return -1;
    return ask.extent.fe_physical;
}

/* ---- memory load: so many MiB, written at so many MiB a second ---- */

static pthread_mutex_t dirty_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t dirty_given = PTHREAD_COND_INITIALIZER;
static u64 *dirty_memory, dirty_pages, dirty_position;
static double dirty_rate;
static volatile u64 dirtied;

static void *dirty(void *unused)
{
    double due = 0;
    u64 last = now_ns();
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&dirty_lock);
        /* Every thread that wakes up costs the machine that emulates this one. */
        while (!dirty_pages) {
            pthread_cond_wait(&dirty_given, &dirty_lock);
            last = now_ns();
        }
        u64 now = now_ns();
        /* What was missed by more than a fifth of a second is not made up for. */
        double rate = dirty_rate, most = rate > 0 ? rate * 256 / 5 : 4096;
        due = rate > 0 ? due + (now - last) / 1e9 * rate * 256 : most;
        if (due > most)
            due = most;
        for (; due >= 1; due--) {
            dirty_memory[dirty_position * WORDS + (dirtied % WORDS)] = mix(dirtied);
            dirty_position = (dirty_position + 1) % dirty_pages;
            dirtied++;
        }
        pthread_mutex_unlock(&dirty_lock);
        last = now;
        if (rate > 0)
            nap_ns(20000000);
    }
    return 0;
}

static int set_dirty(u64 mib, double rate)
{
    struct sysinfo about;
    int failed = 0;
    pthread_mutex_lock(&dirty_lock);
    if (dirty_pages)
        munmap(dirty_memory, dirty_pages * BLOCK);
    dirty_pages = dirty_position = 0;
    /* This is the first process: where memory ends, so does the guest. */
    if (sysinfo(&about) || (mib + 8) << 20 > about.freeram * about.mem_unit) {
        failed = mib != 0;
    } else if (mib) {
        dirty_memory = mmap(0, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        failed = dirty_memory == MAP_FAILED;
        if (!failed) {
            for (u64 k = 0; k < (mib << 20) / 8; k++)
                dirty_memory[k] = mix(k);
            dirty_pages = mib * 256;
        }
    }
    dirty_rate = rate;
    pthread_cond_signal(&dirty_given);
    pthread_mutex_unlock(&dirty_lock);
    return failed;
}

/* ---- disk load: random blocks, each with a generation that memory knows ---- */

static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t blocks_given = PTHREAD_COND_INITIALIZER;
static int block_file[MAX_DISKS];
static uint32_t *generation[MAX_DISKS];
static u64 block_count, block_random = 88172645463325252ull;
static double block_rate;
static volatile u64 block_operations;

/* Words 0 to 2 say which block and generation this is, the others follow from them. */
static void fill_block(u64 *block, int disk, u64 index, u64 written)
{
    block[0] = disk;
    block[1] = index;
    block[2] = written;
    for (int k = 3; k < WORDS; k++)
        block[k] = mix(block[0] << 56 ^ index << 24 ^ written << 40 ^ k);
}

/* The generation of a block: 0 where it was never written, all ones where it is not what was ever written there. */
static u64 read_block(u64 *block, u64 *expected, int disk, u64 index)
{
    ssize_t n = pread(block_file[disk], block, BLOCK, index * BLOCK);
    if (n < 0)
        say(1, "ERR reading block %llu of disk %d: %s", (unsigned long long)index, disk, strerror(errno));
    if (n < BLOCK)
        return n < 0 ? ~0ull : 0;
    u64 any = 0;
    for (int k = 0; k < WORDS; k++)
        any |= block[k];
    if (!any)
        return 0;
    fill_block(expected, disk, index, block[2]);
    return memcmp(block, expected, BLOCK) ? ~0ull : block[2];
}

static int check_block(u64 *block, u64 *expected, int disk, u64 index)
{
    u64 found = read_block(block, expected, disk, index);
    if (found == generation[disk][index])
        return 0;
    bad++;
    say(1, "BAD block disk=%d index=%llu generation=%lld memory=%u", disk, (unsigned long long)index, (long long)found,
        generation[disk][index]);
    return 1;
}

static u64 random_word(void)
{
    block_random ^= block_random << 13;
    block_random ^= block_random >> 7;
    return block_random ^= block_random << 17;
}

static void *write_blocks(void *unused)
{
    u64 *block = aligned(BLOCK), *expected = aligned(BLOCK);
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&blocks_lock);
        while (!block_count)
            pthread_cond_wait(&blocks_given, &blocks_lock);
        int d = random_word() % disks;
        u64 i = random_word() % block_count;
        double rate = block_rate;
        fill_block(block, d, i, generation[d][i] + 1);
        /* Under the lock, so nobody sees the block and what memory knows of it differ; a machine that is restored
           to an instant in between goes on from there. */
        if (pwrite(block_file[d], block, BLOCK, i * BLOCK) == BLOCK)
            generation[d][i]++;
        else
            say(1, "ERR writing block %llu of disk %d: %s", (unsigned long long)i, d, strerror(errno));
        check_block(block, expected, random_word() % disks, random_word() % block_count);
        block_operations++;
        pthread_mutex_unlock(&blocks_lock);
        nap_ns(rate > 0 ? (u64)(1e9 / rate) : 0);
    }
    return 0;
}

/* Begins or ends it. Blocks of an earlier boot are taken as they are, if they are what was once written there. */
static int set_blocks(u64 count, double rate)
{
    int failed = 0;
    u64 *block = aligned(BLOCK), *expected = aligned(BLOCK);
    pthread_mutex_lock(&blocks_lock);
    if (count != block_count) {
        for (int d = 0; d < disks; d++) {
            if (block_count) {
                close(block_file[d]);
                free(generation[d]);
            }
            if (!count)
                continue;
            char path[64];
            snprintf(path, sizeof path, "/vd%c/blocks", 'a' + d);
            block_file[d] = open(path, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0644);
            generation[d] = calloc(count, sizeof *generation[d]);
            failed |= block_file[d] < 0 || !generation[d];
            for (u64 i = 0; !failed && i < count; i++) {
                u64 found = read_block(block, expected, d, i);
                if (found == ~0ull) {
                    bad++;
                    int k = 0;
                    while (block[k] == expected[k])
                        k++;
                    say(1,
                        "BAD block disk=%d index=%llu is not what was written there: it says disk=%llu index=%llu generation=%llu, and "
                        "differs from word %d on",
                        d, (unsigned long long)i, (unsigned long long)block[0], (unsigned long long)block[1],
                        (unsigned long long)block[2], k);
                }
                generation[d][i] = found;
            }
        }
        block_count = failed ? 0 : count;
    }
    block_rate = rate;
    pthread_cond_signal(&blocks_given);
    pthread_mutex_unlock(&blocks_lock);
    free(block);
    free(expected);
    return failed;
}

static void verify_blocks(u64 *checked, u64 *wrong)
{
    u64 *block = aligned(BLOCK), *expected = aligned(BLOCK);
    *checked = *wrong = 0;
    pthread_mutex_lock(&blocks_lock);
    for (int d = 0; d < disks; d++)
        for (u64 i = 0; i < block_count; i++, ++*checked)
            *wrong += check_block(block, expected, d, i);
    pthread_mutex_unlock(&blocks_lock);
    free(block);
    free(expected);
}

/* ---- commands ---- */

/* A shell's output goes to the host as hex digits: it may hold any bytes. */
static void shell(const char *id, const char *command)
{
    static char output[SHELL_OUTPUT], line[2 * SHELL_OUTPUT + 128];
    FILE *pipe = popen(command, "r");
    if (!pipe) {
        say(1, "R %s error no shell: %s", id, strerror(errno));
        return;
    }
    size_t size = fread(output, 1, sizeof output, pipe);
    int cut = size == sizeof output && fgetc(pipe) != EOF;
    while (cut && fgetc(pipe) != EOF)
        ;
    int status = pclose(pipe);
    size_t n = sprintf(line, "R %s ok status=%d cut=%d output=", id,
                       WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), cut);
    for (size_t k = 0; k < size; k++) {
        line[n++] = "0123456789abcdef"[(unsigned char)output[k] >> 4];
        line[n++] = "0123456789abcdef"[(unsigned char)output[k] & 15];
    }
    line[n++] = '\n';
    put(1, line, n);
}

/* Returns once no tick is under way: nothing is half done until "go". */
static void hold_ticks(void)
{
    for (hold = 1; !held; nap_ns(1000000))
        ;
}

/* Ends the guest, when nobody writes any more: the disks go away under who still does. */
static void end(int how)
{
    hold_ticks();
    set_dirty(0, 0);
    set_blocks(0, 0);
    nap_ns(50000000); /* the host reads what was said */
    sync();
    reboot(how);
}

/* As init programs have it: SIGUSR2 is power off, SIGTERM is reboot. */
static volatile sig_atomic_t asked_to_end;

static void on_signal(int signal)
{
    asked_to_end = signal;
}

static void run(char *line)
{
    char *id = strtok(line, " "), *command = strtok(0, " "), *rest = strtok(0, "");
    double a = 0, b = 0;
    if (!id || !command)
        return;
    int given = rest ? sscanf(rest, "%lf %lf", &a, &b) : 0;
    if (!strcmp(command, "status")) {
        say(1, "R %s ok ticks=%llu bad=%llu gap_us=%llu dirtied=%llu operations=%llu up_us=%llu", id,
            (unsigned long long)ticks, (unsigned long long)bad, (unsigned long long)(gap_ns / 1000),
            (unsigned long long)dirtied, (unsigned long long)block_operations, (unsigned long long)(now_ns() / 1000));
    } else if (!strcmp(command, "forget-gap")) {
        gap_ns = 0;
        say(1, "R %s ok", id);
    } else if (!strcmp(command, "hold")) {
        hold_ticks();
        say(1, "R %s ok ticks=%llu", id, (unsigned long long)ticks);
    } else if (!strcmp(command, "go")) {
        hold = 0;
        say(1, "R %s ok", id);
    } else if (!strcmp(command, "tick") && given == 1 && a >= 0) {
        tick_ns = a * 1e6;
        say(1, "R %s ok", id);
    } else if (!strcmp(command, "dirty") && given == 2 && a >= 0 && b >= 0) {
        if (set_dirty(a, b))
            say(1, "R %s error the guest has no %.0f MiB to spare", id, a);
        else
            say(1, "R %s ok", id);
    } else if (!strcmp(command, "blocks") && given == 2 && a >= 0 && a <= MAX_BLOCKS && b >= 0) {
        if (disks == 0 || set_blocks(a, b))
            say(1, "R %s error no file for the blocks: %s", id, strerror(errno));
        else
            say(1, "R %s ok", id);
    } else if (!strcmp(command, "verify")) {
        u64 checked, wrong;
        verify_blocks(&checked, &wrong);
        say(1, "R %s ok checked=%llu wrong=%llu", id, (unsigned long long)checked, (unsigned long long)wrong);
    } else if (!strcmp(command, "offset") && given == 1) {
        long long offset = counter_offset(a);
        say(1, offset < 0 ? "R %s error no such counter, or it lies in pieces" : "R %s ok offset=%lld", id, offset);
    } else if (!strcmp(command, "sync")) {
        sync();
        say(1, "R %s ok", id);
    } else if (!strcmp(command, "sh") && rest) {
        shell(id, rest);
    } else if (!strcmp(command, "quit") || !strcmp(command, "reboot")) {
        say(1, "R %s ok", id);
        end(*command == 'q' ? RB_POWER_OFF : RB_AUTOBOOT);
    } else {
        say(1, "R %s error not understood: %s %s", id, command, rest ? rest : "");
    }
}

static void start(void *(*body)(void *))
{
    pthread_t thread;
    if (pthread_create(&thread, 0, body, 0)) {
        dprintf(2, "WITNESS: no thread\n");
        exit(1);
    }
}

int main(int count, char **words)
{
    static char input[8192];
    size_t size = 0;
    if (count != 4 || (disks = atoi(words[2])) < 0 || disks > MAX_DISKS) {
        dprintf(2, "usage: witness PORT DISKS TICK_MS\n");
        return 64;
    }
    tick_ns = strtoull(words[3], 0, 10) * 1000000;
    port = open(words[1], O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0) {
        dprintf(2, "WITNESS: %s: %s\n", words[1], strerror(errno));
        return 1;
    }
    signal(SIGUSR2, on_signal);
    signal(SIGTERM, on_signal);
    start_counter();
    start(tick);
    start(dirty);
    start(write_blocks);
    for (;;) {
        struct pollfd ready = {port, POLLIN, 0};
        /* What is kept goes on when the host reads; for all else this thread is woken up, but by a signal. */
        poll(&ready, 1, pending_size ? 50 : 500);
        if (asked_to_end)
            end(asked_to_end == SIGUSR2 ? RB_POWER_OFF : RB_AUTOBOOT);
        pthread_mutex_lock(&out_lock);
        flush_pending();
        pthread_mutex_unlock(&out_lock);
        while (waitpid(-1, 0, WNOHANG) > 0) /* the first process inherits what others leave */
            ;
        if (!(ready.revents & POLLIN)) {
            if (ready.revents)
                nap_ns(20000000); /* nobody at the other end */
            continue;
        }
        ssize_t n = read(port, input + size, sizeof input - size);
        if (n <= 0) {
            nap_ns(20000000);
            continue;
        }
        size += n;
        char *line = input, *end;
        while ((end = memchr(line, '\n', input + size - line))) {
            *end = 0;
            run(line);
            line = end + 1;
        }
        size -= line - input;
        memmove(input, line, size);
        if (size == sizeof input)
            size = 0; /* no line is that long */
    }
}
