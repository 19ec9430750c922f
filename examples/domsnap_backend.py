"""The wire of a domsnap plug-in, to import: framing, handshake, dispatch, progress, errors; durable files and locks.

Standard library only. Copy it beside your plug-in. A plug-in derives from `Backend`, answers the methods of its
storage, and ends with `serve(methods(MyBackend()))`. Each method takes `params` (docs/plugin-schema.json) and the
`Call`, and returns the result. docs/backend-authors.md is the guide, `domsnap-backend-dir.py` the example.

It writes nothing to standard output but answers: `print` in a plug-in must go to standard error.
"""

import concurrent.futures
import errno
import fcntl
import json
import os
import struct
import sys
import threading

PROTOCOL = 1
CHUNK = 64 * 1024
FLUSH = 64 * 1024 * 1024
METHODS = (
    "hello", "adopt", "inspect", "discover", "plan", "lock", "release", "yield_locks", "open_chain", "apply", "undo",
    "salvage", "status", "check", "cost_of_delete", "manifest_directory", "layer_file",
)  # fmt: skip


# Errors ------------------------------------------------------------


class Failure(Exception):
    """An error that domsnap reports. `kind` is one of the schema; `advice` says what the user can do."""

    def __init__(self, kind, message, advice=None):
        super().__init__(message)
        self.kind, self.message, self.advice = kind, message, advice


def _explained(error):
    kinds = {errno.ENOENT: "not-found", errno.ENOSPC: "no-space", errno.EDQUOT: "no-space", errno.EEXIST: "exists"}
    return Failure(kinds.get(error.errno, "io"), f"{error.filename}: {error.strerror}")


# The wire ------------------------------------------------------------

_OUTPUT = threading.Lock()
_CANCELLED = set()


def _send(document):
    line = json.dumps({"jsonrpc": "2.0", **document}).encode() + b"\n"
    with _OUTPUT:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


class Call:
    """A request in progress. Report progress in all that may take long: a minute of silence is taken for a hang."""

    def __init__(self, number):
        self.number = number

    def progress(self, done, total):
        _send({"method": "progress", "params": {"id": self.number, "done": done, "total": total}})

    def is_cancelled(self):
        return self.number in _CANCELLED


def methods(backend):
    """The methods that `backend` answers, by name."""
    return {name: getattr(backend, name) for name in METHODS if hasattr(backend, name)}


def _answer(answered, request):
    number = request["id"]
    try:
        method = answered.get(request["method"])
        if method is None:
            _send({"id": number, "error": {"code": -32601, "message": f"no method {request['method']}"}})
            return
        try:
            result = method(request["params"], Call(number))
        except OSError as error:
            raise _explained(error) from error
        _send({"id": number, "result": result})
    except Failure as failure:
        data = {"kind": failure.kind, "advice": failure.advice}
        _send({"id": number, "error": {"code": 1, "message": failure.message, "data": data}})
    except Exception as defect:  # so that every request is answered
        data = {"kind": "internal"}
        _send({"id": number, "error": {"code": 1, "message": f"a defect: {defect!r}", "data": data}})
    finally:
        _CANCELLED.discard(number)


def serve(answered):
    """Answers requests until domsnap is gone; does not return."""
    # Requests come at once, for several disks, and are to be cancelled while they are done.
    workers = concurrent.futures.ThreadPoolExecutor(16)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["method"] == "cancel":
            _CANCELLED.add(request["params"]["id"])
        else:
            workers.submit(_answer, answered, request)
    # domsnap is gone: end now, in the middle of any work. The locks end with this process, and not before.
    os._exit(0)


# Steps ------------------------------------------------------------


def step(params, action, summary, size=0, **more):
    """One step of a plan. `action` is yours alone: it comes back in `apply`, `undo`, `status` and `salvage`."""
    return {"target": params["disk"]["target"], "action": action, "summary": summary, "bytes": size, **more}


def action_of(params, *known):
    """The action of the step in `params`, of which `do` must be one of `known`: a journal may be of a newer plug-in."""
    action = params["step"]["action"]
    if not isinstance(action, dict) or action.get("do") not in known:
        raise Failure("internal", f"the journal has a step that this plug-in does not know: {action}")
    return action


# Files ------------------------------------------------------------


def flush_directory(directory):
    """Makes names in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory):
    """Makes `directory`, durably, if it is not there."""
    try:
        os.mkdir(directory)
        flush_directory(os.path.dirname(directory))
    except FileExistsError:
        pass


def remove_directory(directory):
    """Makes removals in `directory` durable, and removes it if it is empty."""
    try:
        flush_directory(directory)
        os.rmdir(directory)
        flush_directory(os.path.dirname(directory))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def remove(*files):
    """Removes the files that are there. The caller flushes their directory."""
    for file in files:
        try:
            os.unlink(file)
        except FileNotFoundError:
            pass


def list_directory(directory):
    """The sorted names in `directory`; none if it is not there."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def same_file(one, other):
    """Returns true if both names are of one file."""
    try:
        return os.path.samefile(one, other)
    except FileNotFoundError:
        return False


def same_content(one, other, call):
    """Returns true if both files hold the same bytes."""
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


def copy_file(source, to, call):
    """Makes the whole copy `to` of `source`, or nothing of that name; done before, it does nothing.

    The copy is flushed under the name `to` + ".part" before it gets its own name. The name is flushed before this
    returns.
    """
    if os.path.exists(to):
        return
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
                # No progress can be reported of one long flush at the end.
                writing.flush()
                os.fdatasync(writing.fileno())
            call.progress(done, found.st_size)
            if call.is_cancelled():
                raise Failure("cancelled", f"copying {source} was cancelled")
        writing.truncate(done)
        writing.flush()
        os.fsync(writing.fileno())
    os.rename(part, to)
    flush_directory(os.path.dirname(to))


# Locks ------------------------------------------------------------


def _identity(found):
    return (found.st_dev, found.st_ino)


def _lock(path):
    """Locks what `path` names against other plug-ins. The lock ends with this process, whatever happens to it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Failure("busy", f"{path} is in use by another process", "wait until that has ended") from None
        if _identity(os.fstat(handle)) == _identity(os.stat(path)):
            return handle
        os.close(handle)  # another file got the name meanwhile


def _lock_bytes(handle, kind):
    """Sets QEMU's own locks: bytes from 100 on for what it does with an image, from 200 on for what no other process may."""
    fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, 100, 200, 0))


def _keep_others_out(held, path, opened):
    """Locks what `path` names, against QEMU too, unless the domain's own QEMU has it open."""
    what = _identity(os.stat(path))
    if what not in held:
        handle = _lock(path)
        what = _identity(os.fstat(handle))
        held[what] = handle
    if what not in opened:
        try:
            _lock_bytes(held[what], fcntl.F_WRLCK)
        except (BlockingIOError, PermissionError):
            raise Failure("busy", f"{path} is open in a QEMU", "shut the machine down") from None


def _opened(params):
    return {(file["device"], file["inode"]) for file in params["open"]}


# The backend ------------------------------------------------------------


class Backend:
    """What a backend of files is alike in. Override what your storage does otherwise."""

    format = None
    capabilities = {}

    def __init__(self):
        self._held = {}  # of each disk that is held, by its path: the handles that lock, by the file that they lock
        self._guard = threading.Lock()

    def hello(self, params, call):
        return {"protocol": PROTOCOL, "format": self.format, "capabilities": self.capabilities}

    def lock(self, params, call):
        path, held = params["disk"]["path"], {}
        try:
            _keep_others_out(held, path, _opened(params))
        except Failure:
            for handle in held.values():
                os.close(handle)
            raise
        with self._guard:
            self._held[path] = held
        return {"lock": path.encode("unicode_escape").decode()}

    def release(self, params, call):
        with self._guard:
            for path in list(self._held):
                if path.encode("unicode_escape").decode() == params["lock"]:
                    for handle in self._held.pop(path).values():
                        os.close(handle)

    def yield_locks(self, params, call):
        """QEMU is about to open the disk. It stays locked against other plug-ins."""
        with self._guard:
            for handle in self._held.get(params["disk"]["path"], {}).values():
                _lock_bytes(handle, fcntl.F_UNLCK)

    def lock_too(self, params, *paths):
        """Locks files that a step moves, the disk or what becomes it, until the disk is released."""
        path = params["disk"]["path"]
        with self._guard:
            held = self._held.get(path)
            if held is None:
                raise Failure("internal", f"{path} is worked on and not held")
            for one in paths:
                _keep_others_out(held, one, _opened(params))

    def discover(self, params, call):
        return {"points": []}

    def open_chain(self, params, call):
        return [{"file": params["disk"]["path"], "format": "raw"}]

    def check(self, params, call):
        return []

    def manifest_directory(self, params, call):
        return params["disk"]["path"] + ".domsnap"

    def layer_file(self, params, call):
        return params["disk"]["path"]
