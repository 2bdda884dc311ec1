// How tiles lie in shared memory, and how the matrix instructions are told: plain arithmetic, for
// host and device. A tile of R rows is cut into panels of 64 columns; a panel is R rows of 128
// bytes, in which the copy engine has exchanged the 16-byte pieces of row r by r % 8 (the 128-byte
// swizzle). Panels begin at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CODIR_FAST_HOST_DEVICE __host__ __device__
#else
#define CODIR_FAST_HOST_DEVICE
#endif

namespace codir_fast {
namespace sm90 {

constexpr int kPanelColumns = 64;  // of 16 bits
constexpr int kRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // the pattern repeats after 8 rows
constexpr int kProductDepth = 16;  // columns (first product) or rows (second) an instruction takes

CODIR_FAST_HOST_DEVICE constexpr int ceil_div(std::int64_t a, std::int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

CODIR_FAST_HOST_DEVICE constexpr int panel_bytes(int rows) { return rows * kRowBytes; }

// PTX ISA, "Matrix descriptor": address, leading and stride byte offsets in units of 16 bytes in
// bits 0-13, 16-29 and 32-45; bits 62-63 are 1 for the 128-byte swizzle.
CODIR_FAST_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address,
                                                                 std::uint32_t leading_bytes,
                                                                 std::uint32_t stride_bytes) {
  return static_cast<std::uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(stride_bytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// A tile read along its rows (operands of q.b), 16 columns at a time. Groups of 8 rows are a
// swizzle apart; the leading offset is not looked at. `step`: columns 16 step .. 16 step + 15.
CODIR_FAST_HOST_DEVICE constexpr std::uint64_t along_rows(std::uint32_t tile) {
  return matrix_descriptor(tile, 16, kSwizzleBytes);
}
CODIR_FAST_HOST_DEVICE constexpr std::uint64_t along_rows(std::uint64_t descriptor, int rows,
                                                          int step) {
  constexpr int kSteps = kPanelColumns / kProductDepth;
  return descriptor +
         ((step / kSteps) * panel_bytes(rows) + (step % kSteps) * kProductDepth * 2) / 16;
}

// The same tile read along its columns (the rows that weights multiply): all columns of 16 rows.
// The leading offset leads to the next panel, the stride to the next 8 rows. `step`: rows 16 step
// .. 16 step + 15.
CODIR_FAST_HOST_DEVICE constexpr std::uint64_t along_columns(std::uint32_t tile, int rows) {
  return matrix_descriptor(tile, panel_bytes(rows), kSwizzleBytes);
}
CODIR_FAST_HOST_DEVICE constexpr std::uint64_t along_columns(std::uint64_t descriptor, int step) {
  return descriptor + step * kProductDepth * kRowBytes / 16;
}

}  // namespace sm90
}  // namespace codir_fast
