/* Loaded first into a process (LD_PRELOAD). Calls on files below CHAOS_ROOT fail: of the kind CHAOS_CALL (read, write, fsync, link) those
   from number CHAOS_NTH on, CHAOS_TIMES of them, with the error CHAOS_ERRNO; each adds one byte to the file CHAOS_COUNT.
   CHAOS_CLOCK_S is added to the time of day. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    static long seen;
    const char *root = getenv("CHAOS_ROOT"), *kind = getenv("CHAOS_CALL");
    if (!root || !kind || strcmp(kind, call) || strncmp(path, root, strlen(root))) return 0;
    long number = __sync_add_and_fetch(&seen, 1), nth = atol(getenv("CHAOS_NTH"));
    if (number < nth || number >= nth + atol(getenv("CHAOS_TIMES"))) return 0;
    int log = syscall(SYS_openat, AT_FDCWD, getenv("CHAOS_COUNT"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    syscall(SYS_write, log, "x", 1);
    syscall(SYS_close, log);
    errno = atoi(getenv("CHAOS_ERRNO"));
    return 1;
}

static int fails_at(const char *call, int file) {
    char link[64], path[4096];
    if (!getenv("CHAOS_CALL")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FILE_CALL(kind, name, type, parameters, ...) \
    type name parameters { NEXT(name); return fails_at(kind, file) ? -1 : next(__VA_ARGS__); }

FILE_CALL("read", read, ssize_t, (int file, void *to, size_t n), file, to, n)
FILE_CALL("read", pread, ssize_t, (int file, void *to, size_t n, off_t at), file, to, n, at)
FILE_CALL("read", pread64, ssize_t, (int file, void *to, size_t n, off64_t at), file, to, n, at)
FILE_CALL("read", preadv2, ssize_t, (int file, const struct iovec *to, int n, off_t at, int flags), file, to, n, at, flags)
FILE_CALL("read", preadv64v2, ssize_t, (int file, const struct iovec *to, int n, off64_t at, int flags), file, to, n, at, flags)
FILE_CALL("write", write, ssize_t, (int file, const void *from, size_t n), file, from, n)
FILE_CALL("write", writev, ssize_t, (int file, const struct iovec *from, int n), file, from, n)
FILE_CALL("write", pwrite, ssize_t, (int file, const void *from, size_t n, off_t at), file, from, n, at)
FILE_CALL("write", pwrite64, ssize_t, (int file, const void *from, size_t n, off64_t at), file, from, n, at)
FILE_CALL("fsync", fsync, int, (int file), file)
FILE_CALL("fsync", fdatasync, int, (int file), file)

int link(const char *from, const char *to) {
    NEXT(link);
    return fails("link", to) ? -1 : next(from, to);
}

int linkat(int folder, const char *from, int other, const char *to, int flags) {
    NEXT(linkat);
    return fails("link", to) ? -1 : next(folder, from, other, to, flags);
}

static long ahead(void) {
    const char *seconds = getenv("CHAOS_CLOCK_S");
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int status = syscall(SYS_gettimeofday, now, zone);
    if (!status) now->tv_sec += ahead();
    return status;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
