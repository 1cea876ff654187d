/* Files and folders. */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

int64_t read_whole(int file, uint8_t *buffer, int64_t room, int64_t expected, int wait) {
    int64_t size = 0;
    while (size < room) {
        struct iovec piece = {buffer + size, (size_t)(room - size)};
        ssize_t got = wait ? pread(file, piece.iov_base, piece.iov_len, size) : preadv2(file, &piece, 1, size, RWF_NOWAIT);
        if (got == 0 || (got == expected && got < room && size == 0 && got % 4096 != 0)) return size + got;
        if (got > 0) size += got;
        else if (!wait && errno == EAGAIN) return -3;
        else if (!wait && errno == EOPNOTSUPP) wait = 1;
        else if (errno != EINTR) return -1;
    }
    return -2;
}

/* Read [offsets[i], offsets[i] + ends[i] - begins[i]) of a file into [begins[i], ends[i]) of `buffer`, for each of `n` pieces; `ends` is
 * lowered where the file has fewer bytes. Return 0, or errno. */
int64_t aecore_read_pieces(int file, const int64_t *offsets, int64_t n, uint8_t *buffer, const int64_t *begins, int64_t *ends) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = begins[i];
        while (at < ends[i]) {
            ssize_t got = pread(file, buffer + at, (size_t)(ends[i] - at), offsets[i] + at - begins[i]);
            if (got > 0) at += got;
            else if (got == 0) ends[i] = at;
            else if (errno != EINTR) return errno;
        }
    }
    return 0;
}

static void write_hex(char *text, uint64_t value) {
    for (int i = 15; i >= 0; i--, value >>= 4) text[i] = "0123456789abcdef"[value & 15];
}

int64_t write_state(const struct stat *found, char *state) {
    int64_t modified = found->st_mtim.tv_sec * INT64_C(1000000000) + found->st_mtim.tv_nsec;
    int64_t changed = found->st_ctim.tv_sec * INT64_C(1000000000) + found->st_ctim.tv_nsec;
    write_hex(state, (uint64_t)modified);
    write_hex(state + 17, (uint64_t)changed);
    write_hex(state + 34, (uint64_t)found->st_ino);
    state[16] = state[33] = ':';
    return modified > changed ? modified : changed;
}

typedef struct {
    int64_t size, changed;
    char state[STATE];
} Entry;

static int by_name(const void *one, const void *other) { return strcmp(*(char *const *)one, *(char *const *)other); }

/* List an open folder, sorted: zero-terminated names into `names`; of regular files the bytes into `sizes`, when they were changed last into
 * `changed`, and zero-terminated states of STATE characters into `states`; of everything else -1, 0 and dashes.
 * `room` is as large as `names`, `order` has a place for each of `most` names.
 *
 * Return the bytes of all names, or -1 if they do not fit (`capacity` bytes of names, `most` of them), or -2 if the folder cannot be read. */
int64_t aecore_list(int folder, char *names, char *room, int64_t capacity, char **order, int64_t *sizes, int64_t *changed, char *states,
                    int64_t most) {
    int again = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* `closedir` closes it */
    DIR *entries = again < 0 ? NULL : fdopendir(again);
    int64_t count = 0, at = 0, status = 0;
    if (!entries) {
        if (again >= 0) close(again);
        return -2;
    }
    errno = 0;
    for (struct dirent *entry; status == 0 && (entry = readdir(entries)); errno = 0) {
        struct stat found;
        Entry file = {.size = -1};
        int64_t length = (int64_t)strlen(entry->d_name);
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (count == most || at + length + 1 + (int64_t)sizeof file > capacity) {
            status = -1;
            continue;
        }
        if ((entry->d_type == DT_REG || entry->d_type == DT_UNKNOWN) && fstatat(folder, entry->d_name, &found, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(found.st_mode)) {
            file.size = found.st_size;
            file.changed = write_state(&found, file.state);
        } else
            memset(file.state, '-', STATE);
        order[count++] = memcpy(room + at, entry->d_name, (size_t)length + 1);
        memcpy(room + at + length + 1, &file, sizeof file);
        at += length + 1 + (int64_t)sizeof file;
    }
    if (status == 0 && errno) status = -2;
    closedir(entries);
    if (status) return status;
    qsort(order, (size_t)count, sizeof *order, by_name);
    at = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t length = (int64_t)strlen(order[i]);
        memcpy(names + at, order[i], (size_t)length + 1);
        Entry file;
        memcpy(&file, order[i] + length + 1, sizeof file);
        sizes[i] = file.size;
        changed[i] = file.changed;
        memcpy(states + i * (STATE + 1), file.state, STATE);
        states[i * (STATE + 1) + STATE] = 0;
        at += length + 1;
    }
    return at;
}

#endif
