// The persistent index buffer of a batch: which table row each token uses.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace whipstaff {

struct Slots {
  const void* slot;   // (num_tokens,) int32 or int64; anything outside [0, num_slots) means "leave this token alone"
  const float* gain;  // (num_tokens,) how much of the edit to take, 0 = leave alone; null means 1
  int64_t num_tokens, num_slots;
  bool is_int64;

  WHIPSTAFF_HOST_DEVICE int64_t raw(int64_t token) const {
    return is_int64 ? static_cast<const int64_t*>(slot)[token] : static_cast<const int32_t*>(slot)[token];
  }

  // The table row for a token, or -1 where the token is to be left alone.
  WHIPSTAFF_HOST_DEVICE int64_t row(int64_t token) const {
    const int64_t row = raw(token);
    return row >= 0 && row < num_slots && gain_of(token) != 0.0f ? row : -1;
  }

  WHIPSTAFF_HOST_DEVICE float gain_of(int64_t token) const { return gain ? gain[token] : 1.0f; }
};

}  // namespace whipstaff
