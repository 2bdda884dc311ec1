// Neighbouring elements that one instruction moves.
#pragma once

namespace codir_fast {
namespace sm90 {

template <typename T, int kLength>
struct alignas(sizeof(T) * kLength) Vector {
  T value[kLength];
};

}  // namespace sm90
}  // namespace codir_fast
