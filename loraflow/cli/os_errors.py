"""One sentence for an error of the operating system that reaches the command line, such as a file without permission."""

from __future__ import annotations

import errno
import socket

from loraflow.failures import Failure, Network, from_os_error

_FILE = "A file or folder cannot be used."
# errno → (what, next step), where a command says something else than a stage, or a stage has nothing to say
_SENTENCES = {
    errno.EACCES: ("There is no permission for a file or folder.", "correct its permissions, or name another path"),
    errno.EPERM: ("There is no permission for a file or folder.", "correct its permissions, or name another path"),
    errno.EROFS: ("The file system is read-only.", "name a path that can be written to"),
    errno.ENOENT: ("A file or folder does not exist.", "correct the path"),
    errno.EEXIST: ("The target exists already.", "name another path"),
    errno.ENOTEMPTY: ("The target exists already.", "name another path"),
    errno.EIO: ("The disk reported an input/output error.", "check the disk (`dmesg`), then run the command again"),
    errno.EISDIR: ("This is a folder, where a file is needed.", "correct the path"),
    errno.ENOTDIR: ("This is a file, where a folder is needed.", "correct the path"),
    errno.ENAMETOOLONG: ("A path is too long for the file system.", "use shorter names"),
    errno.EMLINK: ("The file system allows no more links to this file.", "name a path on another file system"),
    errno.EMFILE: (
        "This process has too many open files.",
        "raise the limit (`ulimit -n 65536`), then run the command again",
    ),
    errno.ETXTBSY: ("A file is in use by a running program.", "end that program, then run the command again"),
    errno.EAGAIN: ("The system cannot start another process or thread.", "raise the limit: `ulimit -u`"),
}
_NETWORK = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.ENETDOWN,
}  # fmt: skip


def from_system(error: OSError) -> Failure | None:
    """Return the failure for an error of the operating system; None if it is not one.

    Libraries derive their own exceptions from OSError, for example for an answer of a server. Those have no errno.
    """
    if not isinstance(error.errno, int) or error.strerror is None:
        return None
    where = error.filename if isinstance(error.filename, str) else ""
    if where and isinstance(error.filename2, str):  # the target of a rename or link
        where += f" → {error.filename2}"
    if isinstance(error, socket.gaierror) or error.errno in _NETWORK:
        return Network("A remote service did not answer.", where=where, got=error.strerror, next_step="try again")
    if error.errno not in _SENTENCES and (known := from_os_error(error, where)) is not None:
        return known
    what, step = _SENTENCES.get(error.errno, (_FILE, "check the file and its disk, then run the command again"))
    if error.errno == errno.ENOENT and not where:
        step = "enter a folder that exists, and check TMPDIR"
    return Failure(what, where=where, got=error.strerror, next_step=step)
