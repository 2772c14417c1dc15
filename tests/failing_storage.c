/* A layer between a process and the system, in which storage fails for a while: LD_PRELOAD it.

   FAILING_STORAGE="PART:ERRNO:FIRST:SECONDS;..." : calls on paths that contain PART fail with ERRNO,
   from the FIRST of them (from 1) on, for SECONDS. What fails is opening, reading, writing, syncing,
   renaming, making folders and looking at files, by the C library's names. Each beginning of a
   failure is told on stderr.

   With ERRNO 0 the process is killed (SIGKILL) at the FIRST call that changes a file, in the middle
   of what it writes; FIRST 0: at none. Each of these calls is told on stderr. With FAILING_RANK, in
   the process alone whose RANK is that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define MOST 8
static struct rule { char part[128]; int number, first, seen; double seconds, since; } rules[MOST];
static int count;
static const char *parsed;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Once for each text: a process may be told after it has begun. */
static void parse(void) {
    const char *text = getenv("FAILING_STORAGE");
    if (text == parsed) return;
    parsed = text;
    count = 0;
    const char *wanted = getenv("FAILING_RANK"), *rank = getenv("RANK");
    if (wanted && (!rank || strcmp(wanted, rank))) return;
    while (text && *text && count < MOST) {
        struct rule *r = &rules[count];
        memset(r, 0, sizeof *r);
        if (sscanf(text, "%127[^:]:%d:%d:%lf", r->part, &r->number, &r->first, &r->seconds) == 4)
            count++;
        text = strchr(text, ';');
        text = text ? text + 1 : NULL;
    }
}

/* Whether a call on this path is to fail; errno is then set. */
static int fails(const char *path) {
    parse();
    for (int i = 0; path && i < count; i++) {
        struct rule *r = &rules[i];
        if (r->number == 0 || !strstr(path, r->part)) continue;
        if (__sync_add_and_fetch(&r->seen, 1) < r->first) continue;
        if (r->since == 0) {
            r->since = now();
            dprintf(2, "storage fails: %s, errno %d, %.1f s\n", path, r->number, r->seconds);
        }
        if (now() - r->since < r->seconds) { errno = r->number; return 1; }
    }
    return 0;
}

/* Whether the process is to be killed in this call, which changes what is at the path. */
static int is_last(const char *call, const char *path) {
    parse();
    for (int i = 0; path && i < count; i++) {
        struct rule *r = &rules[i];
        if (r->number != 0 || !strstr(path, r->part)) continue;
        int number = __sync_add_and_fetch(&r->seen, 1);
        dprintf(2, "file operation %d: %s %s\n", number, call, path);
        if (number == r->first) return 1;
    }
    return 0;
}

static void end_before(const char *call, const char *path) {
    if (is_last(call, path)) kill(getpid(), SIGKILL);
}

static const char *path_of(int descriptor, char *path, size_t size) {
    char name[64];
    parse();
    if (count == 0 || descriptor < 3) return NULL;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, size - 1);
    if (length <= 0) return NULL;
    path[length] = 0;
    return path;
}

static int fails_at(int descriptor) {
    char path[4096];
    return fails(path_of(descriptor, path, sizeof path));
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & O_CREAT) end_before("open", path); \
        return fails(path) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return fails(path) ? -1 : real(at, path, flags, mode); \
    }
#define PREAD(name) \
    ssize_t name(int fd, void *to, size_t size, off_t at) { \
        REAL(ssize_t, #name, int, void *, size_t, off_t); \
        return fails_at(fd) ? -1 : real(fd, to, size, at); \
    }
#define STAT(name, type) \
    int name(const char *path, struct type *to) { \
        REAL(int, #name, const char *, struct type *); \
        return fails(path) ? -1 : real(path, to); \
    }
#define FSTATAT(name, type) \
    int name(int at, const char *path, struct type *to, int flags) { \
        REAL(int, #name, int, const char *, struct type *, int); \
        return fails(path) ? -1 : real(at, path, to, flags); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PREAD(pread)
PREAD(pread64)
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

ssize_t read(int fd, void *to, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    return fails_at(fd) ? -1 : real(fd, to, size);
}

ssize_t write(int fd, const void *from, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[4096];
    if (is_last("write", path_of(fd, path, sizeof path))) {
        real(fd, from, size / 2);
        kill(getpid(), SIGKILL);
    }
    return fails_at(fd) ? -1 : real(fd, from, size);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    char path[4096];
    end_before("fsync", path_of(fd, path, sizeof path));
    return fails_at(fd) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    end_before("rename", to);
    return fails(to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    end_before("mkdir", path);
    return fails(path) ? -1 : real(path, mode);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    end_before("unlink", path);
    return real(path);
}

/* A folder is emptied by names below it: the descriptor's path stands for theirs. */
int unlinkat(int at, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[4096];
    end_before("unlinkat in", path_of(at, path, sizeof path));
    return real(at, name, flags);
}
