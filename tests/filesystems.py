"""Simulated file systems without some calls, by a library that a child process loads before the C library."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

FOLDER = "lacking"
"""Paths that contain a folder of this name are on the simulated file system."""

# The calls listed in CALLS fail with ERRNO. "create" is an open for writing, "sync" an fsync of a file, "syncfolder"
# one of a folder.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    char list[512], name[64];
    if (!path || !strstr(path, "/lacking")) return 0;
    snprintf(list, sizeof list, ",%s,", getenv("CALLS") ? getenv("CALLS") : "");
    snprintf(name, sizeof name, ",%s,", call);
    if (!strstr(list, name)) return 0;
    errno = atoi(getenv("ERRNO"));
    return 1;
}
static int fails_fd(const char *call, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return fails(call, path);
}
static int is_folder(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISDIR(s.st_mode); }
#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

int flock(int fd, int op) {
    if (!(op & 8) && fails_fd("flock", fd)) return -1;
    return NEXT(int (*)(int, int), "flock")(fd, op);
}
#define FCNTL(name) int name(int fd, int cmd, ...) { \
    va_list a; va_start(a, cmd); void *arg = va_arg(a, void *); va_end(a); \
    if ((cmd == F_SETLK || cmd == F_SETLKW) && fails_fd("lockf", fd)) return -1; \
    return NEXT(int (*)(int, int, void *), #name)(fd, cmd, arg); }
FCNTL(fcntl)
FCNTL(fcntl64)
int fsync(int fd) {
    if (fails_fd(is_folder(fd) ? "syncfolder" : "sync", fd)) return -1;
    return NEXT(int (*)(int), "fsync")(fd);
}
int fdatasync(int fd) {
    if (fails_fd("sync", fd)) return -1;
    return NEXT(int (*)(int), "fdatasync")(fd);
}
#define FADVISE(name) int name(int fd, off_t offset, off_t size, int advice) { \
    if (fails_fd("fadvise", fd)) return errno; \
    return NEXT(int (*)(int, off_t, off_t, int), #name)(fd, offset, size, advice); }
FADVISE(posix_fadvise)
FADVISE(posix_fadvise64)
#define PREADV2(name) ssize_t name(int fd, const struct iovec *v, int n, off_t offset, int flags) { \
    if (flags && fails_fd("preadv2", fd)) return -1; \
    return NEXT(ssize_t (*)(int, const struct iovec *, int, off_t, int), #name)(fd, v, n, offset, flags); }
PREADV2(preadv2)
PREADV2(preadv64v2)
int chmod(const char *path, mode_t mode) {
    if (fails("chmod", path)) return -1;
    return NEXT(int (*)(const char *, mode_t), "chmod")(path, mode);
}
int fchmodat(int at, const char *path, mode_t mode, int flags) {
    if (fails("chmod", path)) return -1;
    return NEXT(int (*)(int, const char *, mode_t, int), "fchmodat")(at, path, mode, flags);
}
int futimens(int fd, const struct timespec *times) {
    if (fails_fd("utime", fd)) return -1;
    return NEXT(int (*)(int, const struct timespec *), "futimens")(fd, times);
}
int link(const char *from, const char *to) {
    if (fails("link", to)) return -1;
    return NEXT(int (*)(const char *, const char *), "link")(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    if (fails("link", to)) return -1;
    return NEXT(int (*)(int, const char *, int, const char *, int), "linkat")(a, from, b, to, flags);
}
#define STATVFS(name, type) int name(const char *path, type *out) { \
    if (fails("statvfs", path)) return -1; \
    return NEXT(int (*)(const char *, type *), #name)(path, out); }
STATVFS(statvfs, struct statvfs)
STATVFS(statvfs64, struct statvfs64)
int mkdir(const char *path, mode_t mode) {
    if (fails("mkdir", path)) return -1;
    return NEXT(int (*)(const char *, mode_t), "mkdir")(path, mode);
}
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list a; va_start(a, flags); int mode = va_arg(a, int); va_end(a); \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails("create", path)) return -1; \
    return NEXT(int (*)(const char *, int, int), #name)(path, flags, mode); }
OPEN(open)
OPEN(open64)
"""


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("a simulated file system requires Linux and a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="cmran-filesystem-"))
    (folder / "shim.c").write_text(SOURCE)
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"the C compiler failed to build the library: {done.stderr.splitlines()[:1]}")
    return folder / "shim.so"


def lacking(*arguments: str | Path, calls: str, number: int, **environment: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`; `calls` (comma-separated) fail with errno `number` in folders named `lacking`.

    Environment variables whose value is None are removed.
    """
    merged = {**os.environ, "LD_PRELOAD": str(_library()), "CALLS": calls, "ERRNO": str(number)}
    merged |= {key: str(value) for key, value in environment.items() if value is not None}
    for key in [key for key, value in environment.items() if value is None]:
        merged.pop(key, None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=merged, capture_output=True, text=True, check=False
    )
