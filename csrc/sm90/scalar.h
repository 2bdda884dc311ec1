// A number that a kernel takes by value, or reads where it lies on the device: nothing waits for
// it.
#pragma once

namespace codir_fast {
namespace sm90 {

// `value`, or the float or double that on_device points to.
struct Scalar {
  double value;
  const void* on_device;
  bool is_double;
};

}  // namespace sm90
}  // namespace codir_fast
