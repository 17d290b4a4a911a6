/* Shares of a loop for some threads: those of torch's own OpenMP where it is GNU's, so that no second set fights it;
   else new ones. */

#ifndef THREADS_H
#define THREADS_H

#include <pthread.h>
#include <stdint.h>

#define MAX_THREADS 64
#define SHARES_PER_THREAD 4

typedef void (*Work)(const void *job, int64_t first, int64_t last);
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    Work work;
    const void *job;
    int64_t next, end, step;
} Task;

static void take_shares(void *argument) {
    Task *task = argument;
    int64_t first;
    while ((first = __atomic_fetch_add(&task->next, task->step, __ATOMIC_RELAXED)) < task->end)
        task->work(task->job, first, first + task->step < task->end ? first + task->step : task->end);
}

static void *take_shares_thread(void *argument) {
    take_shares(argument);
    return 0;
}

static void share(Work work, const void *job, int64_t end, int64_t num_threads, Parallel parallel) {
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (num_threads > end) num_threads = end;
    if (num_threads <= 1) {
        work(job, 0, end);
        return;
    }
    Task task = {work, job, 0, end, (end + num_threads * SHARES_PER_THREAD - 1) / (num_threads * SHARES_PER_THREAD)};
    if (parallel) {
        parallel(take_shares, &task, (unsigned)num_threads, 0);
        return;
    }
    pthread_t threads[MAX_THREADS];
    int64_t started = 0;
    while (started < num_threads - 1 && !pthread_create(&threads[started], 0, take_shares_thread, &task)) started++;
    take_shares(&task);
    for (int64_t i = 0; i < started; i++) pthread_join(threads[i], 0);
}

#endif
