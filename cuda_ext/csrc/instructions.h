// Instructions as the machines know them, written by `python -m whipstaff.cuda_ext.header`: edit instructions.py.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace whipstaff {

constexpr int MAX_GROUP = 64;  // directions that read the same h
constexpr int NUM_OPERANDS = 5;
constexpr int NUM_PHI_ARGS = 4;

enum class Operand : int32_t {
  Number = 0,
  Gain = 1,
  Condition = 2,
  Line = 3,
  MaybeLine = 4,
  Phi = 5,
  Stride = 6,
  Feature = 7,
  NumFeatures = 8,
};

enum class Needs : int32_t { Nothing, Encoder, Kept };

enum class Opcode : int32_t {
  End = 0,
  Jump = 1,
  Gain = 2,
  When = 3,
  Ramp = 4,
  Diag = 5,
  Cross = 6,
  Dir = 7,
  Save = 8,
  Renorm = 9,
  Probe = 10,
  Meter = 11,
  TopK = 12,
  NormIn = 13,
  Keep = 14,
  Apart = 15,
  Take = 16,
};
constexpr int NUM_OPS = 17;

enum class Phi : int32_t {
  Off = 0,  // 0: the direction is padding
  Affine = 1,  // a z + b
  Set = 2,  // a - z
  Clamp = 3,  // min(max(z, a), b) - z
  Gated = 4,  // b z + c where z > a, else d: ReLU and JumpReLU features
  Tanh = 5,  // a tanh z
  Silu = 6,  // a z / (1 + e^-z)
  Sign = 7,  // a sign z
  Angle = 8,  // pair: turned to angle a in its plane, where z > b; the length is kept
  Rotate = 9,  // pair: turned by angle a
  TopK = 10,  // as GATED, but only where also z >= tau, which the instruction TOP_K finds
};
constexpr int NUM_PHIS = 11;

WHIPSTAFF_HOST_DEVICE inline bool is_pair(Phi phi) { return phi == Phi::Angle || phi == Phi::Rotate; }

// DO(instruction, the machine's step) for each of them.
#define WHIPSTAFF_FOR_EACH_OP(DO) \
  DO(End, end) \
  DO(Jump, jump) \
  DO(Gain, gain) \
  DO(When, when) \
  DO(Ramp, ramp) \
  DO(Diag, diag) \
  DO(Cross, cross) \
  DO(Dir, dir) \
  DO(Save, save) \
  DO(Renorm, renorm) \
  DO(Probe, probe) \
  DO(Meter, meter) \
  DO(TopK, top_k) \
  DO(NormIn, norm_in) \
  DO(Keep, keep) \
  DO(Apart, apart) \
  DO(Take, take)

struct OperandKind {
  const char* title;
  int32_t lowest;
};

constexpr OperandKind OPERAND_KINDS[] = {
    {"", 0},
    {"gains column", -1},
    {"condition", 0},
    {"line", 0},
    {"line", -1},
    {"phi", 0},
    {"stride", 1},
    {"encoder row", 0},
    {"encoder row", 0},
};

struct OpKind {
  const char* name;
  Operand operands[NUM_OPERANDS];
  int passes;  // over the row, about
  Needs needs;
  const char* needed;
};

constexpr OpKind OP_KINDS[] = {
    {"END", {}, 0, Needs::Nothing, ""},
    {"JUMP", {Operand::Number}, 0, Needs::Nothing, ""},
    {"GAIN", {Operand::Gain}, 0, Needs::Nothing, ""},
    {"WHEN", {Operand::Condition, Operand::Number}, 0, Needs::Nothing, ""},
    {"RAMP", {Operand::Condition}, 0, Needs::Nothing, ""},
    {"DIAG", {Operand::MaybeLine, Operand::MaybeLine}, 1, Needs::Nothing, ""},
    {"CROSS", {Operand::Line, Operand::Line, Operand::Stride}, 2, Needs::Nothing, ""},
    {"DIR", {Operand::MaybeLine, Operand::MaybeLine, Operand::Phi, Operand::Number}, 2, Needs::Nothing, ""},
    {"SAVE", {}, 2, Needs::Nothing, ""},
    {"RENORM", {}, 2, Needs::Nothing, ""},
    {"PROBE", {Operand::Line, Operand::Condition, Operand::Number, Operand::Number}, 2, Needs::Nothing, ""},
    {"METER", {}, 2, Needs::Nothing, ""},
    {"TOP_K", {Operand::Feature, Operand::NumFeatures, Operand::Number}, 0, Needs::Encoder, "encoder"},
    {"NORM_IN", {Operand::Number}, 2, Needs::Nothing, ""},
    {"KEEP", {}, 2, Needs::Kept, "kept"},
    {"APART", {}, 1, Needs::Nothing, ""},
    {"TAKE", {Operand::MaybeLine}, 2, Needs::Nothing, ""},
};

}  // namespace whipstaff
