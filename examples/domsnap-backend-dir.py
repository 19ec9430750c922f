#!/usr/bin/env python3
"""A backend of domsnap in a process of its own: points of a file are copies of it, in a directory beside it.

Standard library only. Install it as `domsnap-backend-dir` in the directory of plug-ins; then it serves disks
that are registered with `format=dir`, of running domains too.
docs/backend-authors.md tells how it came to be, and docs/plugin-schema.json what is said.

On the disk, for a file `/vm/web.img`:

    /vm/web.img              what the domain writes
    /vm/web.img.points/TAG   a point: a whole copy
    /vm/web.img.points/*.part, next-*   not yet anything: an undo removes them
    /vm/web.img.points/rescued-TAG      what a domain wrote after a crash, and an undo would have lost

A copy that is to be removed is `doomed-TAG` among the disk's layers in the catalogue, from the commit point until it is gone. So its
removal may be deferred: the next plan of a delete takes it up.

What is durable before what: a copy is flushed before it gets its name, and a name is flushed before the step is said to be done.
"""

import concurrent.futures
import datetime
import errno
import fcntl
import json
import os
import struct
import sys
import threading

FORMAT = "dir"
PROTOCOL = 1
LAYER = "disk"
DOOMED = "doomed-"
CHUNK = 64 * 1024
FLUSH = 64 * 1024 * 1024


class Failure(Exception):
    """What domsnap is told: the kinds are those of the schema."""

    def __init__(self, kind, message, advice=None):
        super().__init__(message)
        self.kind, self.message, self.advice = kind, message, advice


def explained(error):
    kinds = {errno.ENOENT: "not-found", errno.ENOSPC: "no-space", errno.EDQUOT: "no-space", errno.EEXIST: "exists"}
    return Failure(kinds.get(error.errno, "io"), f"{error.filename}: {error.strerror}")


# Files ---------------------------------------------------------------------------------------------------------------


def points_of(disk):
    return disk["path"] + ".points"


def point(disk, tag):
    return os.path.join(points_of(disk), tag)


def flush(directory):
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(*files):
    for file in files:
        try:
            os.unlink(file)
        except FileNotFoundError:
            pass


def tidy(disk):
    """Flushes what was removed; no point left, no directory."""
    try:
        flush(points_of(disk))
        os.rmdir(points_of(disk))
        flush(os.path.dirname(disk["path"]))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def same_file(one, other):
    try:
        return os.path.samefile(one, other)
    except FileNotFoundError:
        return False


def same_content(one, other, call):
    with open(one, "rb") as a, open(other, "rb") as b:
        size = os.fstat(a.fileno()).st_size
        if size != os.fstat(b.fileno()).st_size:
            return False
        while True:
            call.progress(a.tell(), size)
            left, right = a.read(CHUNK), b.read(CHUNK)
            if left != right:
                return False
            if not left:
                return True


def copy(disk, source, to, call):
    """Makes the whole copy `to` of `source`, or nothing of that name."""
    if os.path.exists(to):
        return  # done before
    try:
        os.mkdir(points_of(disk))
        flush(os.path.dirname(disk["path"]))
    except FileExistsError:
        pass
    part = to + ".part"
    with open(source, "rb") as reading, open(part, "wb") as writing:
        found = os.fstat(reading.fileno())
        os.fchmod(writing.fileno(), found.st_mode & 0o7777)
        try:
            os.fchown(writing.fileno(), found.st_uid, found.st_gid)
        except PermissionError:
            pass
        done = 0
        while True:
            chunk = reading.read(CHUNK)
            if not chunk:
                break
            if chunk.count(0) == len(chunk):
                writing.seek(len(chunk), os.SEEK_CUR)  # a hole
            else:
                writing.write(chunk)
            done += len(chunk)
            if done % FLUSH == 0:
                # So that the flush at the end, of which no progress can be told, does not take long.
                writing.flush()
                os.fdatasync(writing.fileno())
            call.progress(done, found.st_size)
            if call.is_cancelled():
                raise Failure("cancelled", f"copying {source} was cancelled")
        writing.truncate(done)
        writing.flush()
        os.fsync(writing.fileno())
    os.rename(part, to)
    flush(points_of(disk))


# Locks ---------------------------------------------------------------------------------------------------------------

HOLDS = {}  # of each disk that is held, by its path: the handles that lock, by what they lock
HOLDS_LOCK = threading.Lock()


def identity(found):
    return (found.st_dev, found.st_ino)


def lock(path):
    """Locks what `path` names against others of us. The lock ends with this process, whatever happens to it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Failure("busy", f"{path} is in use by another process", "wait until that has ended") from None
        if identity(os.fstat(handle)) == identity(os.stat(path)):
            return handle
        os.close(handle)  # it was exchanged meanwhile


def lock_bytes(handle, way):
    """QEMU locks bytes of an image from 100 on for what it does with it, and from 200 on for what nobody else may."""
    fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", way, os.SEEK_SET, 100, 200, 0))


def keep_others_out(held, path, opened):
    """Locks what `path` names, against QEMU too, unless the domain's own QEMU has it open."""
    what = identity(os.stat(path))
    if what not in held:
        handle = lock(path)
        what = identity(os.fstat(handle))
        held[what] = handle
    if what not in opened:
        try:
            lock_bytes(held[what], fcntl.F_WRLCK)
        except (BlockingIOError, PermissionError):
            raise Failure("busy", f"{path} is open in a QEMU", "shut the machine down") from None


def opened_of(params):
    return {(file["device"], file["inode"]) for file in params["open"]}


def lock_too(params, *paths):
    """What is the disk, or becomes it, is locked before a step moves it, and stays so."""
    path = params["disk"]["path"]
    with HOLDS_LOCK:
        held = HOLDS.get(path)
        if held is None:
            raise Failure("internal", f"{path} is worked on and not held")
        for one in paths:
            keep_others_out(held, one, opened_of(params))


# Methods -------------------------------------------------------------------------------------------------------------


def hello(params, call):
    return {
        "protocol": PROTOCOL,
        "format": FORMAT,
        "capabilities": {
            "internal": True,
            "external": False,
            "preferred": "internal",
            "live": True,
            "delete_in_chain": True,
            "snapshot_of_snapshot": True,
            "max_depth": 1,
        },
    }


def size_of(disk):
    path = disk["path"]
    if os.path.islink(path) or not os.path.isfile(path):
        raise Failure("not-found", f"{path} is no file", "give the path of the file that the domain writes")
    return os.stat(path)


def adopt(params, call):
    disk = params["disk"]
    size_of(disk)
    if len(os.fsencode(os.path.basename(disk["path"]))) > 240:
        raise Failure("refused", f"{disk['path']}: the name is too long for a directory beside it", "rename it")
    return {**disk, "active": LAYER, "owned": [LAYER]}


def moment(stat):
    return datetime.datetime.fromtimestamp(stat.st_mtime, datetime.timezone.utc).isoformat()


def tags_of(disk):
    try:
        names = os.listdir(points_of(disk))
    except FileNotFoundError:
        names = []
    return sorted(name for name in names if len(name) == 8 and all(c in "0123456789abcdef" for c in name))


def inspect(params, call):
    disk = params["disk"]
    found = size_of(disk)
    internal = []
    for tag in tags_of(disk):
        copied = os.stat(point(disk, tag))
        internal.append(
            {"tag": tag, "virtual_size": copied.st_size, "created": moment(copied), "vm_state_size": 0}
        )
    layer = {
        "name": LAYER,
        "file": disk["path"],
        "format": FORMAT,
        "named": False,
        "backing": None,
        "owned": True,
        "virtual_size": found.st_size,
        "allocated": found.st_blocks * 512,
        "internal": internal,
        "dependents": [],
    }
    return {"target": disk["target"], "active": LAYER, "layers": [layer]}


def discover(params, call):
    disk = params["disk"]
    known = {point["tag"] for point in params["known"]}
    points = []
    for tag in tags_of(disk):
        if tag not in known:
            copied = os.stat(point(disk, tag))
            points.append(
                {
                    "name": f"found-{tag}",
                    "layer": LAYER,
                    "tag": tag,
                    "created": moment(copied),
                    "virtual_size": copied.st_size,
                }
            )
    points.sort(key=lambda found: found["created"])
    return {"points": points}


def plan(params, call):
    disk, asked = params["disk"], params["request"]
    steps = []

    def step(group, action, summary, size, inside=False):
        planned = {"group": group, "target": disk["target"], "action": action, "summary": summary}
        steps.append({**planned, "bytes": size, "inside": inside})

    def edit(kind, tags):
        return [{"edit": kind, "target": disk["target"], "layer": DOOMED + tag} for tag in tags]

    def drop(tags, summary):
        """Where that cannot be done, it waits: what is left is known by the layers that are removed with it."""
        step("finish", {"do": "drop", "tags": tags}, summary, 0)
        steps[-1].update({"deferrable": True, "edits": edit("remove-layer", tags)})

    def required(at):
        if at["layer"] != LAYER or at["tag"] not in tags_of(disk):
            raise Failure("not-found", f"{disk['path']} has no point {at['tag']}", "see `domsnap check`")
        return at["tag"]

    if asked["request"] == "delete":
        kept = {point["tag"] for point in asked["keep"]}
        there = tags_of(disk)
        gone = [at["tag"] for at in asked["drop"] if at["tag"] not in kept and at["tag"] in there]
        left = [name[len(DOOMED) :] for name in disk["owned"] if name.startswith(DOOMED)]
        if gone or left:
            drop(gone + left, f"remove the copies {', '.join(gone + left)}")
        return {"steps": steps, "commit": edit("add-layer", gone)}

    if params["active_path"] != "keep" or asked.get("overlay") or asked.get("kind") == "external":
        raise Failure("unsupported", f"points of {disk['path']} are copies", "leave the way to the backend")
    tag = format(asked["stamp"], "08x")
    if os.path.exists(point(disk, tag)):
        raise Failure("exists", f"{point(disk, tag)} is there already", "try again")
    if asked["request"] == "create":
        # Of a running domain, the copy is made while the guest stands still: inside the instant.
        live = params["state"].get("attached", False)
        step("cut", {"do": "copy", "tag": tag}, f"copy {disk['path']} as {tag}", size_of(disk).st_size, live)
        planned = {"steps": steps, "point": {"layer": LAYER, "tag": tag}}
        return {**planned, "instant": {"take": "by-backend"}} if live else planned
    if asked["request"] == "revert":
        to = required(asked["to"])
        size = os.stat(point(disk, to)).st_size
        step("prepare", {"do": "stage", "from": to, "as": f"next-{tag}"}, f"copy {to} anew", size)
        exchange = {"do": "exchange", "from": to, "next": f"next-{tag}", "former": tag}
        step("cut", exchange, f"put that in the place of {disk['path']}", 0)
        if asked["save"] is not None:
            return {"steps": steps, "point": {"layer": LAYER, "tag": tag}}
        drop([tag], "remove what was there before")
        return {"steps": steps, "commit": edit("add-layer", [tag])}
    raise Failure("unsupported", f"a request that this plug-in does not know: {asked['request']}", "use a newer one")


def step_of(params, *known):
    action = params["step"]["action"]
    if not isinstance(action, dict) or action.get("do") not in known:
        raise Failure("internal", f"the journal has a step that this plug-in does not know: {action}")
    return params["disk"], action


STEPS = ("copy", "stage", "exchange", "drop")


def apply(params, call):
    disk, action = step_of(params, *STEPS)
    parent = os.path.dirname(disk["path"])
    if action["do"] == "copy":
        copy(disk, disk["path"], point(disk, action["tag"]), call)
    elif action["do"] == "stage":
        copy(disk, point(disk, action["from"]), point(disk, action["as"]), call)
    elif action["do"] == "exchange":
        coming, former = point(disk, action["next"]), point(disk, action["former"])
        if not os.path.exists(coming):
            if os.path.exists(former):
                return  # done before
            raise Failure("corrupt", f"{coming} is gone", "see `domsnap check`")
        lock_too(params, disk["path"], coming)
        # First what is there gets a second name, then the first name moves: at every instant the path opens to a whole disk.
        if not os.path.exists(former):
            os.link(disk["path"], former)
            flush(points_of(disk))
        os.rename(coming, disk["path"])
        flush(parent)
        flush(points_of(disk))
    else:
        remove(*(point(disk, tag) for tag in action["tags"]))
        tidy(disk)


def undo(params, call):
    disk, action = step_of(params, "copy", "stage", "exchange")
    if action["do"] == "exchange":
        former = point(disk, action["former"])
        if not os.path.exists(former):
            return  # never begun, or undone before
        if same_file(former, disk["path"]):
            os.unlink(former)
        else:
            lock_too(params, disk["path"], former)
            os.rename(former, disk["path"])
            flush(os.path.dirname(disk["path"]))
        flush(points_of(disk))
        return
    made = point(disk, action["tag"] if action["do"] == "copy" else action["as"])
    remove(made, made + ".part")
    tidy(disk)


def salvage(params, call):
    disk, action = step_of(params, *STEPS)
    nothing = {"salvage": "nothing"}
    if action["do"] != "exchange":
        return nothing
    former, path = point(disk, action["former"]), disk["path"]
    if not os.path.exists(former) or same_file(former, path):
        return nothing  # the path names what it always did: an undo leaves that
    if same_content(path, point(disk, action["from"]), call):
        return nothing
    rescued = point(disk, "rescued-" + action["former"])
    if not os.path.exists(rescued):
        os.link(path, rescued)
        flush(points_of(disk))
    return {
        "salvage": "put-aside",
        "words": f"{disk['target']}: the domain ran after the crash; what it wrote is in {rescued}",
    }


def status(params, call):
    disk, action = step_of(params, *STEPS)
    if action["do"] == "exchange":
        coming = os.path.exists(point(disk, action["next"]))
        former = os.path.exists(point(disk, action["former"]))
        return {(True, False): "notdone", (False, True): "done", (True, True): "partly"}.get((coming, former), "notdone")
    if action["do"] == "drop":
        left = [tag for tag in action["tags"] if os.path.exists(point(disk, tag))]
        return "done" if not left else "notdone" if len(left) == len(action["tags"]) else "partly"
    made = point(disk, action["tag"] if action["do"] == "copy" else action["as"])
    if os.path.exists(made):
        return "done"
    return "partly" if os.path.exists(made + ".part") else "notdone"


def hold(params, call):
    path, held = params["disk"]["path"], {}
    try:
        keep_others_out(held, path, opened_of(params))
    except Failure:
        for handle in held.values():
            os.close(handle)
        raise
    with HOLDS_LOCK:
        HOLDS[path] = held
    return {"hold": path.encode("unicode_escape").decode()}


def release(params, call):
    with HOLDS_LOCK:
        for path in list(HOLDS):
            if path.encode("unicode_escape").decode() == params["hold"]:
                for handle in HOLDS.pop(path).values():
                    os.close(handle)


def yield_locks(params, call):
    """A QEMU is about to open the disk. It stays locked against others of us."""
    with HOLDS_LOCK:
        for handle in HOLDS.get(params["disk"]["path"], {}).values():
            lock_bytes(handle, fcntl.F_UNLCK)


def open_chain(params, call):
    return [{"file": params["disk"]["path"], "format": "raw"}]


def check(params, call):
    disk = params["disk"]
    findings = []
    try:
        names = os.listdir(points_of(disk))
    except FileNotFoundError:
        names = []
    for name in names:
        if name.endswith(".part") or name.startswith("next-"):
            findings.append(
                {"severity": "note", "subject": point(disk, name), "message": "what an operation left: it may be removed"}
            )
    return findings


def cost_of_delete(params, call):
    disk = params["disk"]
    kept = {point["tag"] for point in params["keep"]}
    gone = {at["tag"] for at in params["drop"]} - kept
    frees = sum(os.stat(point(disk, tag)).st_blocks * 512 for tag in tags_of(disk) if tag in gone)
    return {"frees": frees, "moves": 0}


def manifest_directory(params, call):
    return params["disk"]["path"] + ".domsnap"


def layer_file(params, call):
    return params["disk"]["path"]


METHODS = {
    method.__name__: method
    for method in (
        hello, adopt, inspect, discover, plan, hold, release, yield_locks, open_chain, apply, undo, salvage, status,
        check, cost_of_delete, manifest_directory, layer_file,
    )
}  # fmt: skip


# The wire ------------------------------------------------------------------------------------------------------------

SAYING = threading.Lock()
CANCELLED = set()


def say(document):
    line = json.dumps({"jsonrpc": "2.0", **document}).encode() + b"\n"
    with SAYING:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


class Call:
    """A request that is under way."""

    def __init__(self, number):
        self.number = number

    def progress(self, done, total):
        say({"method": "progress", "params": {"id": self.number, "done": done, "total": total}})

    def is_cancelled(self):
        return self.number in CANCELLED


def answer(request):
    number = request["id"]
    try:
        method = METHODS.get(request["method"])
        if method is None:
            say({"id": number, "error": {"code": -32601, "message": f"no method {request['method']}"}})
            return
        try:
            result = method(request["params"], Call(number))
        except OSError as error:
            raise explained(error) from error
        say({"id": number, "result": result})
    except Failure as failure:
        data = {"kind": failure.kind, "advice": failure.advice}
        say({"id": number, "error": {"code": 1, "message": failure.message, "data": data}})
    except Exception as defect:  # so that every request is answered
        data = {"kind": "internal"}
        say({"id": number, "error": {"code": 1, "message": f"a defect: {defect!r}", "data": data}})
    finally:
        CANCELLED.discard(number)


def main():
    # Requests come at once, for several disks, and are to be cancelled while they are done.
    workers = concurrent.futures.ThreadPoolExecutor(16)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["method"] == "cancel":
            CANCELLED.add(request["params"]["id"])
        else:
            workers.submit(answer, request)
    # domsnap is gone: so is whoever waits for anything that is still being done.
    os._exit(0)


if __name__ == "__main__":
    main()
