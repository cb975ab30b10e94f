#include "pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace lmcache {

struct Pool::Job {
  size_t count;
  const std::function<void(size_t)>* task;
  std::atomic<size_t> next{0};
  int helpers = 0;  // guarded by Crew::mutex

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*task)(i);
  }
  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }
};

struct Pool::Crew {
  pid_t process = getpid();
  std::mutex mutex;
  std::condition_variable work, done;
  std::vector<Job*> jobs;
  bool closing = false;
  std::vector<std::thread> threads;

  explicit Crew(int count) {
    for (int i = 0; i < count; ++i) threads.emplace_back([this] { serve(); });
  }

  Job* open_job() {
    for (Job* job : jobs)
      if (!job->exhausted()) return job;
    return nullptr;
  }

  void serve() {
    std::unique_lock lock(mutex);
    for (;;) {
      Job* job = nullptr;
      work.wait(lock, [&] { return closing || (job = open_job()) != nullptr; });
      if (closing) return;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) done.notify_all();
    }
  }
};

Pool::Pool(int threads) : threads_(threads) {}

Pool::~Pool() {
  if (crew_ == nullptr) return;
  if (crew_->process != getpid()) {
    (void)crew_.release();  // the threads are another process's
    return;
  }
  {
    std::lock_guard lock(crew_->mutex);
    crew_->closing = true;
  }
  crew_->work.notify_all();
  for (std::thread& thread : crew_->threads) thread.join();
}

Pool::Crew* Pool::crew() {
  std::lock_guard lock(starting_);
  // After a fork there are no threads here, and the old locks may be held by nobody for ever.
  if (crew_ != nullptr && crew_->process != getpid()) (void)crew_.release();
  if (crew_ == nullptr) crew_ = std::make_unique<Crew>(threads_ - 1);
  return crew_.get();
}

void Pool::run(size_t count, const std::function<void(size_t)>& task) {
  if (count <= 1 || threads_ == 1) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  Crew* crew = this->crew();
  Job job{count, &task};
  {
    std::lock_guard lock(crew->mutex);
    crew->jobs.push_back(&job);
  }
  crew->work.notify_all();
  job.work();
  std::unique_lock lock(crew->mutex);
  crew->jobs.erase(std::find(crew->jobs.begin(), crew->jobs.end(), &job));
  crew->done.wait(lock, [&] { return job.helpers == 0; });
}

}  // namespace lmcache
