#include "numpy/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace sparsekit {
namespace {

constexpr int32_t max_threads = 1024;

/// One call of `run`. It lives on the caller's stack: the caller leaves only when no worker holds it.
struct Job {
  std::atomic<int64_t> next;
  int64_t end, chunk;
  ParallelFor::Body body;
  void* context;
  int32_t helpers = 0;      // workers inside, guarded by the pool's mutex
  int32_t max_helpers = 0;  // as many as the call's `threads` allows besides the caller

  bool work_left() const { return next.load(std::memory_order_relaxed) < end; }
  void work() {
    for (int64_t first; (first = next.fetch_add(chunk, std::memory_order_relaxed)) < end;) {
      body(first, std::min(first + chunk, end), context);
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(&job);
      while (workers_ < job.max_helpers) {
        std::thread([this] { serve(); }).detach();
        ++workers_;
      }
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    left_.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = open_job()) != nullptr; });
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) left_.notify_all();
    }
  }
  Job* open_job() {
    for (Job* job : jobs_) {
      if (job->helpers < job->max_helpers && job->work_left()) return job;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::vector<Job*> jobs_;
  int32_t workers_ = 0;
};

// Never destroyed, because its workers run until the process ends. A forked child has none of them and starts anew.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static bool once = [] {
    the_pool = new Pool;
    return pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; }) == 0;
  }();
  (void)once;
  return *the_pool;
}

int32_t default_threads() {
  if (const char* text = std::getenv("SPARSEKIT_NUM_THREADS")) {
    int value = std::atoi(text);
    if (value > 0) return std::min(value, max_threads);
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::min(CPU_COUNT(&set), max_threads);
  return int32_t(std::max(1u, std::thread::hardware_concurrency()));
}

// ParallelFor::run carries no thread count: the last thread_pool() of the calling thread left it here.
thread_local int32_t call_threads = 1;

void run(int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
  // Four ranges per thread: enough to even out ranges of unequal work, few enough for per-range set-up to vanish.
  int64_t chunk = std::max({grain, (end - begin + 4 * call_threads - 1) / (4 * call_threads), int64_t(1)});
  int64_t chunks = (end - begin + chunk - 1) / chunk;
  Job job;
  job.next = begin, job.end = end, job.chunk = chunk, job.body = body, job.context = context;
  job.max_helpers = int32_t(std::min<int64_t>(chunks, call_threads) - 1);
  if (job.max_helpers <= 0) {
    job.work();
  } else {
    pool().run(job);
  }
}

}  // namespace

ParallelFor thread_pool(int32_t threads) {
  ParallelFor parallel;
  parallel.run = run;
  parallel.threads = call_threads = threads > 0 ? std::min(threads, max_threads) : default_threads();
  return parallel;
}

}  // namespace sparsekit
