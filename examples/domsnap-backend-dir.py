#!/usr/bin/env python3
"""A backend of domsnap in a process of its own: points of a file are copies of it, in a directory beside it.

Standard library only. Install it as `domsnap-backend-dir`, with `domsnap_backend.py` beside it, in the directory of
plug-ins. Then it serves disks that are registered with `format=dir`, of running domains too. docs/backend-authors.md
is the guide.

On the disk, for a file `/vm/web.img`:

    /vm/web.img              what the domain writes
    /vm/web.img.points/TAG   a point: a whole copy
    /vm/web.img.points/*.part, next-*   not yet anything: an undo removes them
    /vm/web.img.points/rescued-TAG      what a domain wrote after a crash, and an undo would have lost

A copy that is to be removed is `doomed-TAG` among the disk's layers in the catalogue, from the commit point until it
is gone. So its removal may be deferred: the next plan of a delete removes it.

What is durable before what: a copy is flushed before it gets its name, and a name is flushed before the step is done.
"""

import datetime
import os
import sys

sys.dont_write_bytecode = True  # the directory of plug-ins is not ours to write
import domsnap_backend as wire
from domsnap_backend import Failure, action_of, flush_directory, step

FORMAT = "dir"
LAYER = "disk"
DOOMED = "doomed-"
STEPS = ("copy", "stage", "exchange", "drop")


def points_of(disk):
    return disk["path"] + ".points"


def point(disk, name):
    return os.path.join(points_of(disk), name)


def tags_of(disk):
    names = wire.list_directory(points_of(disk))
    return [name for name in names if len(name) == 8 and all(c in "0123456789abcdef" for c in name)]


def size_of(disk):
    path = disk["path"]
    if os.path.islink(path) or not os.path.isfile(path):
        raise Failure("not-found", f"{path} is no file", "give the path of the file that the domain writes")
    return os.stat(path)


def made_by(disk, action):
    return point(disk, action["tag"] if action["do"] == "copy" else action["as"])


def described(disk, tag):
    copied = os.stat(point(disk, tag))
    created = datetime.datetime.fromtimestamp(copied.st_mtime, datetime.timezone.utc).isoformat()
    return {"tag": tag, "created": created, "virtual_size": copied.st_size}


class Copies(wire.Backend):
    format = FORMAT
    capabilities = {
        "internal": True,
        "external": False,
        "preferred": "internal",
        "live": True,
        "delete_in_chain": True,
        "snapshot_of_snapshot": True,
        "max_depth": 1,
    }

    def adopt(self, params, call):
        disk = params["disk"]
        size_of(disk)
        if len(os.fsencode(os.path.basename(disk["path"]))) > 240:
            raise Failure("refused", f"{disk['path']}: the name is too long for a directory beside it", "rename it")
        return {**disk, "active": LAYER, "owned": [LAYER]}

    def inspect(self, params, call):
        disk = params["disk"]
        found = size_of(disk)
        layer = {"name": LAYER, "file": disk["path"], "format": FORMAT, "named": False, "backing": None, "owned": True}
        layer.update({"virtual_size": found.st_size, "allocated": found.st_blocks * 512, "dependents": []})
        layer["internal"] = [{**described(disk, tag), "vm_state_size": 0} for tag in tags_of(disk)]
        return {"target": disk["target"], "active": LAYER, "layers": [layer]}

    def discover(self, params, call):
        disk, known = params["disk"], {known["tag"] for known in params["known"]}
        points = [described(disk, tag) for tag in tags_of(disk) if tag not in known]
        points = [{**found, "name": f"found-{found['tag']}", "layer": LAYER} for found in points]
        return {"points": sorted(points, key=lambda found: found["created"])}

    def plan(self, params, call):
        disk, asked = params["disk"], params["request"]

        def edits(kind, tags):
            return [{"edit": kind, "target": disk["target"], "layer": DOOMED + tag} for tag in tags]

        def drop(tags, summary):
            # It may be deferred: what is left is known by the layers that are removed with it.
            action = {"do": "drop", "tags": tags}
            return step(params, action, summary, deferrable=True, edits=edits("remove-layer", tags))

        if asked["request"] == "delete":
            kept, there = {point["tag"] for point in asked["keep"]}, tags_of(disk)
            gone = [at["tag"] for at in asked["drop"] if at["tag"] not in kept and at["tag"] in there]
            tags = gone + [name[len(DOOMED) :] for name in disk["owned"] if name.startswith(DOOMED)]
            finish = [drop(tags, f"remove the copies {', '.join(tags)}")] if tags else []
            return {"commit": edits("add-layer", gone), "finish": finish}
        if params["active_path"] != "keep" or asked.get("overlay") or asked.get("kind") == "external":
            raise Failure("unsupported", f"points of {disk['path']} are copies", "leave the method to the backend")
        tag = format(asked["stamp"], "08x")
        if os.path.exists(point(disk, tag)):
            raise Failure("exists", f"{point(disk, tag)} is there already", "try again")
        taken = {"layer": LAYER, "tag": tag}
        if asked["request"] == "create":
            action, summary = {"do": "copy", "tag": tag}, f"copy {disk['path']} as {tag}"
            steps = [step(params, action, summary, size_of(disk).st_size)]
            if params["state"].get("attached", False):
                # The copy is nested in the hypervisor's cut, in which the guest is paused.
                return {"instant": {"take": "by-backend", "nested": steps}, "point": taken}
            return {"cut": steps, "point": taken}
        if asked["request"] == "revert":
            to, coming = asked["to"]["tag"], f"next-{tag}"
            if asked["to"]["layer"] != LAYER or to not in tags_of(disk):
                raise Failure("not-found", f"{disk['path']} has no point {to}", "see `domsnap check`")
            size = os.stat(point(disk, to)).st_size
            exchange = {"do": "exchange", "from": to, "next": coming, "previous": tag}
            plan = {
                "prepare": [step(params, {"do": "stage", "from": to, "as": coming}, f"copy {to}", size)],
                "cut": [step(params, exchange, f"put that in the place of {disk['path']}")],
            }
            if asked["save"] is not None:
                return {**plan, "point": taken}
            finish = [drop([tag], "remove what was there before")]
            return {**plan, "commit": edits("add-layer", [tag]), "finish": finish}
        raise Failure("unsupported", f"this plug-in does not know the request {asked['request']}", "use a newer one")

    def apply(self, params, call):
        disk, action = params["disk"], action_of(params, *STEPS)
        if action["do"] == "drop":
            wire.remove(*(point(disk, tag) for tag in action["tags"]))
            wire.remove_directory(points_of(disk))
        elif action["do"] == "exchange":
            coming, previous = point(disk, action["next"]), point(disk, action["previous"])
            if not os.path.exists(coming):
                if os.path.exists(previous):
                    return  # done before
                raise Failure("corrupt", f"{coming} is gone", "see `domsnap check`")
            self.lock_too(params, disk["path"], coming)
            # 1) The current file gets a second name. 2) Its first name moves to what comes. So the path opens
            #    to a whole disk at every instant, and an undo finds the current file.
            if not os.path.exists(previous):
                os.link(disk["path"], previous)
                flush_directory(points_of(disk))
            os.rename(coming, disk["path"])
            flush_directory(os.path.dirname(disk["path"]))
            flush_directory(points_of(disk))
        else:
            wire.make_directory(points_of(disk))
            source = disk["path"] if action["do"] == "copy" else point(disk, action["from"])
            wire.copy_file(source, made_by(disk, action), call)

    def undo(self, params, call):
        disk, action = params["disk"], action_of(params, "copy", "stage", "exchange")
        if action["do"] != "exchange":
            wire.remove(made_by(disk, action), made_by(disk, action) + ".part")
            wire.remove_directory(points_of(disk))
            return
        previous = point(disk, action["previous"])
        if not os.path.exists(previous):
            return  # never begun, or undone before
        if wire.same_file(previous, disk["path"]):
            os.unlink(previous)
        else:
            self.lock_too(params, disk["path"], previous)
            os.rename(previous, disk["path"])
            flush_directory(os.path.dirname(disk["path"]))
        flush_directory(points_of(disk))

    def salvage(self, params, call):
        disk, action = params["disk"], action_of(params, *STEPS)
        if action["do"] != "exchange":
            return {"salvage": "nothing"}
        previous = point(disk, action["previous"])
        # Where the path names what it always did, an undo leaves that.
        if not os.path.exists(previous) or wire.same_file(previous, disk["path"]):
            return {"salvage": "nothing"}
        if wire.same_content(disk["path"], point(disk, action["from"]), call):
            return {"salvage": "nothing"}
        rescued = point(disk, "rescued-" + action["previous"])
        if not os.path.exists(rescued):
            os.link(disk["path"], rescued)
            flush_directory(points_of(disk))
        message = f"{disk['target']}: the domain ran after the crash; what it wrote is saved as {rescued}"
        return {"salvage": "saved", "message": message}

    def status(self, params, call):
        disk, action = params["disk"], action_of(params, *STEPS)
        if action["do"] == "exchange":
            coming, previous = (os.path.exists(point(disk, action[name])) for name in ("next", "previous"))
            return "notdone" if not previous else "partly" if coming else "done"
        if action["do"] == "drop":
            left = [tag for tag in action["tags"] if os.path.exists(point(disk, tag))]
            return "done" if not left else "notdone" if len(left) == len(action["tags"]) else "partly"
        made = made_by(disk, action)
        return "done" if os.path.exists(made) else "partly" if os.path.exists(made + ".part") else "notdone"

    def check(self, params, call):
        disk = params["disk"]
        names = wire.list_directory(points_of(disk))
        left = [point(disk, name) for name in names if name.endswith(".part") or name.startswith("next-")]
        message = "an operation left this file: it may be removed"
        return [{"severity": "note", "subject": path, "message": message} for path in left]

    def cost_of_delete(self, params, call):
        disk, kept = params["disk"], {point["tag"] for point in params["keep"]}
        gone = {at["tag"] for at in params["drop"]} - kept
        frees = sum(os.stat(point(disk, tag)).st_blocks * 512 for tag in tags_of(disk) if tag in gone)
        return {"frees": frees, "moves": 0, "certainty": "exact"}


METHODS = wire.methods(Copies())


def main():
    wire.serve(METHODS)


if __name__ == "__main__":
    main()
