// What all kernels share. A sub-group of 16 lanes holds a vector of HEAD_DIM coordinates, SHARE = HEAD_DIM / 16 of them
// in each lane: lane l has those from SHARE·l on. Behind the generated constants, before each kernel.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define LANES 16
#define SUB_GROUPS 8  // of a work-group
#define SHARE (HEAD_DIM / LANES)
#define PASTE(a, b) a##b
#define NOWHERE -1e30f  // the score of what is not seen
#define FOR_SHARE _Pragma("unroll") for (int i = 0; i < SHARE; i++)

// A count that came as floats, 1024·high + low: exact in f16, too.
inline int count_of(REAL high, REAL low) { return (int)high * 1024 + (int)low; }

inline void load(float* x, const __global REAL* source) {
  const uint lane = get_sub_group_local_id();
  FOR_SHARE x[i] = source[SHARE * lane + i];
}

// One more token in a softmax: its score, its value; the largest score so far, the sum of weights and the context.
inline void add(float score, const float* value, float* top, float* sum, float* context) {
  const float larger = fmax(*top, score), old = native_exp(*top - larger), weight = native_exp(score - larger);
  *sum = *sum * old + weight;
  *top = larger;
  FOR_SHARE context[i] = context[i] * old + weight * value[i];
}
