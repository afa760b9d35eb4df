// Temporary memory that stays mapped between calls: touching fresh pages costs more than the arithmetic on them.
#pragma once

#include <cstdint>

namespace ivl {

// Aligned memory from this thread's store, given back to it at the end. Blocks over 32 MiB are freed instead.
void* take_scratch(int64_t bytes, int64_t* capacity);
void give_scratch(void* memory, int64_t capacity);

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(take_scratch(count * sizeof(T), &capacity_))) {}
  ~Scratch() { give_scratch(data_, capacity_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t capacity_;
  T* data_;
};

}  // namespace ivl
