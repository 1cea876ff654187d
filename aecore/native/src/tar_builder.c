/* From files to a tar.
 *
 * The samples are cut into blocks. Two threads read blocks, each file at its offset in the tar, and write the headers around it; one thread
 * if files are large: hashing those takes longer than reading. The caller takes the blocks in their order (`aecore_builder_next_block`), checks
 * their facts and submits them (`aecore_builder_submit`) to a third thread, which hashes them; then the caller writes the pages of the tar
 * that they fill (`aecore_builder_finished_pages`) and releases their memory.
 */

#define _GNU_SOURCE
#include "native.h"

#ifdef HERE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_WAITING = 32, READERS = 2, LARGE = 4096, PAGE = 4096, UNREAD = 0, PLAIN = 1, OTHER = 2 };

typedef struct {
    int64_t folder, num_blocks, num_slots, slot_bytes;
    const char *paths, *names;                  /* zero-terminated */
    const int64_t *path_at, *name_at;           /* where each begins */
    const int32_t *labels;                      /* negative: none */
    const int64_t *starts, *begins, *ends;      /* of each sample in the tar: its first header, its data */
    const int64_t *blocks;                      /* [num_blocks + 1]: the first sample of each block */
    const uint8_t *blank;                       /* header */
    uint8_t *slots;                             /* memory for `num_slots` blocks, each from a page on */
    uint32_t *state;                            /* of the tar's hash */
    uint8_t *digests, *tail;                    /* of the samples; bytes of the tar after its last full page */
    Facts *facts;                               /* of the samples */
    const char *states;                         /* listed ones, STATE characters each; NULL: there are none */
    uint8_t *changed;                           /* of the samples: whether the state was another one after the file was read */
} Given;

typedef struct {
    Given given;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t threads[READERS + 1];
    int64_t taken, shown, submitted, hashed, released; /* blocks */
    int num_threads, stopped;
    uint8_t *kinds; /* of blocks */
} Builder;

static int64_t page_of(int64_t place) { return place & ~(int64_t)(PAGE - 1); }

/* Return the memory of a block, and the offset in the tar of its first byte. */
static uint8_t *slot_of(const Builder *builder, int64_t block, int64_t *origin) {
    *origin = page_of(builder->given.starts[builder->given.blocks[block]]);
    return builder->given.slots + block % builder->given.num_slots * builder->given.slot_bytes;
}

/* Write all but the data of a sample that was read; 0 if it has another size than expected, or is not a known image. */
static int finish_sample(const Given *given, int64_t i, uint8_t *slot, int64_t origin, int64_t size) {
    if (size != given->ends[i] - given->begins[i]) return 0;
    given->facts[i] = examine(slot + (given->begins[i] - origin), size);
    frame_sample(slot + (given->starts[i] - origin), given->blank, given->names + given->name_at[i], given->labels[i], size);
    return given->facts[i].kind != 0;
}

/* Compare the state of a file that was read with the listed one. */
static void compare_state(const Given *given, int64_t i, int file) {
    struct stat found;
    char state[STATE];
    if (!given->states || file < 0) return;
    given->changed[i] = 1;
    if (syscall(SYS_fstat, file, &found)) return; /* `fstat` of the C library looks for a path first: a tenth slower */
    write_state(&found, state);
    given->changed[i] = memcmp(state, given->states + i * STATE, STATE) != 0;
}

/* Read one block. Return 0 as soon as there is anything unusual.
 *
 * Up to 32 files that have to come from the disk are asked for before the first is waited for. */
static int read_block(const Builder *builder, int64_t block) {
    const Given *given = &builder->given;
    int64_t origin, number[MOST_WAITING], i = given->blocks[block], stop = given->blocks[block + 1];
    uint8_t *slot = slot_of(builder, block, &origin);
    int waiting[MOST_WAITING], num = 0, plain = 1;
    while (i < stop || num) {
        int64_t expected = given->ends[i < stop ? i : stop - 1] - given->begins[i < stop ? i : stop - 1], size = -1;
        int file = -1, full = num == MOST_WAITING || i == stop || !plain;
        if (!full) {
            file = openat((int)given->folder, given->paths + given->path_at[i], O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a FIFO does not block */
            full = file < 0 && num && (errno == EMFILE || errno == ENFILE);
        }
        if (full) {
            for (int k = 0; k < num; k++) {
                int64_t late = number[k], length = given->ends[late] - given->begins[late];
                size = plain ? read_whole(waiting[k], slot + (given->begins[late] - origin), length + BLOCK, length, 1) : -1;
                compare_state(given, late, waiting[k]);
                close(waiting[k]);
                plain = plain && finish_sample(given, late, slot, origin, size);
            }
            num = 0;
            if (!plain) return 0;
            continue;
        }
        if (file >= 0) size = read_whole(file, slot + (given->begins[i] - origin), expected + BLOCK, expected, 0);
        if (size == -3) {
            posix_fadvise(file, 0, 0, POSIX_FADV_WILLNEED);
            waiting[num] = file;
            number[num++] = i;
        } else {
            compare_state(given, i, file);
            if (file >= 0) close(file);
            plain = finish_sample(given, i, slot, origin, size);
            if (!plain && !num) return 0;
        }
        i++;
    }
    return 1;
}

static void *reader(void *argument) {
    Builder *builder = argument;
    pthread_mutex_lock(&builder->lock);
    for (;;) {
        while (!builder->stopped && builder->taken < builder->given.num_blocks && builder->taken >= builder->released + builder->given.num_slots)
            pthread_cond_wait(&builder->changed, &builder->lock);
        if (builder->stopped || builder->taken == builder->given.num_blocks) break;
        int64_t block = builder->taken++;
        pthread_mutex_unlock(&builder->lock);
        int plain = read_block(builder, block);
        pthread_mutex_lock(&builder->lock);
        builder->kinds[block] = plain ? PLAIN : OTHER;
        pthread_cond_broadcast(&builder->changed);
    }
    pthread_mutex_unlock(&builder->lock);
    return NULL;
}

/* Pages are hashed and written whole: the first one of a block begins with the end of the block before it. */
static void hash_block(Builder *builder, int64_t block) {
    const Given *given = &builder->given;
    int64_t origin, first = given->blocks[block], stop = given->blocks[block + 1], end = given->starts[stop];
    uint8_t *slot = slot_of(builder, block, &origin);
    memcpy(slot, given->tail, (size_t)(given->starts[first] - origin));
    hash_beside(given->state, slot, (page_of(end) - origin) / 64, slot, origin, given->begins + first, given->ends + first, stop - first,
                given->digests + 32 * first);
    memcpy(given->tail, slot + (page_of(end) - origin), (size_t)(end - page_of(end)));
}

static void *hasher(void *argument) {
    Builder *builder = argument;
    pthread_mutex_lock(&builder->lock);
    for (;;) {
        while (!builder->stopped && builder->hashed == builder->submitted) pthread_cond_wait(&builder->changed, &builder->lock);
        if (builder->hashed == builder->submitted) break; /* submitted blocks are hashed even after the end */
        pthread_mutex_unlock(&builder->lock);
        hash_block(builder, builder->hashed);
        pthread_mutex_lock(&builder->lock);
        builder->hashed++;
        pthread_cond_broadcast(&builder->changed);
    }
    pthread_mutex_unlock(&builder->lock);
    return NULL;
}

/* End the threads of a builder that has begun, and forget it. */
void aecore_builder_stop(Builder **begun) {
    Builder *builder = *begun;
    if (!builder) return;
    *begun = NULL;
    pthread_mutex_lock(&builder->lock);
    builder->stopped = 1;
    pthread_cond_broadcast(&builder->changed);
    pthread_mutex_unlock(&builder->lock);
    for (int k = 0; k < builder->num_threads; k++) pthread_join(builder->threads[k], NULL);
    pthread_cond_destroy(&builder->changed);
    pthread_mutex_destroy(&builder->lock);
    free(builder->kinds);
    free(builder);
}

/* Begin, and leave the builder at `begun`, NULL there if there is no memory or no thread: as a result it would be lost, with its threads running, if
 * a signal raised an exception right after the call. The arguments must stay at their addresses until `aecore_builder_stop`. */
void aecore_builder_start(const Given *given, Builder **begun) {
    Builder *builder = calloc(1, sizeof *builder);
    *begun = NULL;
    if (!builder) return;
    builder->given = *given;
    builder->kinds = calloc((size_t)given->num_blocks, 1);
    pthread_mutex_init(&builder->lock, NULL);
    pthread_cond_init(&builder->changed, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals go to Python's threads */
    int64_t count = given->blocks[given->num_blocks], num_readers = given->starts[count] - given->starts[0] > LARGE * count ? 1 : READERS;
    for (int k = 0; builder->kinds && k <= num_readers; k++) {
        if (pthread_create(&builder->threads[k], NULL, k < num_readers ? reader : hasher, builder) != 0) break;
        builder->num_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    *begun = builder;
    if (builder->num_threads <= num_readers) aecore_builder_stop(begun);
}

/* Wait for the next block to be read. Return 1 if all in it is plain, 0 if not or if there is no block any more. */
int64_t aecore_builder_next_block(Builder *builder) {
    pthread_mutex_lock(&builder->lock);
    while (builder->shown < builder->given.num_blocks && builder->kinds[builder->shown] == UNREAD) pthread_cond_wait(&builder->changed, &builder->lock);
    int64_t plain = builder->shown < builder->given.num_blocks && builder->kinds[builder->shown] == PLAIN;
    builder->shown += plain;
    pthread_mutex_unlock(&builder->lock);
    return plain;
}

/* Submit the block that was read last for hashing. */
void aecore_builder_submit(Builder *builder) {
    pthread_mutex_lock(&builder->lock);
    builder->submitted++;
    pthread_cond_broadcast(&builder->changed);
    pthread_mutex_unlock(&builder->lock);
}

/* Wait until the oldest submitted and not released block is hashed; return the bytes of the full pages that end in it. */
int64_t aecore_builder_finished_pages(Builder *builder) {
    int64_t origin;
    pthread_mutex_lock(&builder->lock);
    while (builder->hashed == builder->released) pthread_cond_wait(&builder->changed, &builder->lock);
    pthread_mutex_unlock(&builder->lock);
    slot_of(builder, builder->released, &origin);
    return page_of(builder->given.starts[builder->given.blocks[builder->released + 1]]) - origin;
}

/* Release its memory. */
void aecore_builder_release(Builder *builder) {
    pthread_mutex_lock(&builder->lock);
    builder->released++;
    pthread_cond_broadcast(&builder->changed);
    pthread_mutex_unlock(&builder->lock);
}

#endif
