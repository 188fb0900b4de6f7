// Lists of tensors that are kept from call to call, under a number: to hand over a list of small tensors costs more
// than to work on them. Included by bindings.cpp alone.
#pragma once

#include <pthread.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "bindings_tensors.h"

namespace fastwrs {
namespace {

using KeptList = std::shared_ptr<const Handles>;

class KeptLists {
 public:
  // Never freed: when a process ends, Python is gone before its tensors. A process that is forked while another thread
  // has the lock would wait for it for ever.
  static KeptLists& all() {
    static KeptLists& lists = *new KeptLists;
    static const int forks = pthread_atfork([] { all().mutex_.lock(); }, unlock, unlock);
    (void)forks;
    return lists;
  }

  int64_t keep(Handles tensors) {
    auto list = std::make_shared<const Handles>(std::move(tensors));
    const std::lock_guard<std::mutex> lock(mutex_);
    lists_.emplace(++last_, std::move(list));
    return last_;
  }
  void forget(int64_t number) {
    KeptList list;  // freed when the lock is: to free a tensor may wait for Python, which may wait for the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lists_.find(number);
    if (found == lists_.end()) return;
    list = std::move(found->second);
    lists_.erase(found);
  }
  // Null if there is none.
  KeptList find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lists_.find(number);
    return found == lists_.end() ? nullptr : found->second;
  }

 private:
  static void unlock() { all().mutex_.unlock(); }

  std::mutex mutex_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, KeptList> lists_;
};

// The list of a number, none for 0; `what` it stands for, of which nothing may be given then.
KeptList kept_list(int64_t number, const Handles& given, const char* what) {
  if (number == 0) return nullptr;
  if (!given.empty()) fail(what, " must be empty where kept_", what, " names a list, got ", given.size());
  KeptList list = KeptLists::all().find(number);
  if (!list) fail("kept_", what, " = ", number, ": no such list is kept");
  return list;
}

}  // namespace
}  // namespace fastwrs
