// A few threads that wait for work, so that a copy doesn't pay for starting one.
//
// Knows tasks by number. Knows nothing about what they do.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lmcache {

class Pool {
 public:
  // `threads` counts the calling thread, so 1 starts none. Threads start when first needed.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Call `task(0)` ... `task(count - 1)`, on this thread and the pool's, and wait for all of them.
  // `task` doesn't throw. Any thread may call this, several at once; whoever calls works too, so
  // it always gets on, however busy the pool is.
  void run(size_t count, const std::function<void(size_t)>& task);

 private:
  struct Job;
  struct Crew;

  Crew* crew();

  int threads_;
  std::mutex starting_;
  std::unique_ptr<Crew> crew_;
};

}  // namespace lmcache
