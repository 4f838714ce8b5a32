// Before the sources of `attend`, on a device without XMX: the built-in in plain OpenCL, so that the form that takes it can
// be held to numpy. Of tests alone: no model has it.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define cl_intel_subgroup_matrix_multiply_accumulate 1
#define cl_intel_subgroup_matrix_multiply_accumulate_tf32 1
#define intel_sub_group_f16_f16_matrix_mad_k16 multiplied

// 8 rows of `a`, whose lane k has column k, with 16 columns of `b`, whose lane n has column n by pairs of rows.
inline float8 multiplied(short8 a, int8 b, float8 sums) {
  for (uint row = 0; row < 8; row++) {
    for (uint k = 0; k < 16; k++) {
      const short number = intel_sub_group_shuffle(a[row], k);
      const half2 pair = as_half2(b[k / 2]);
      sums[row] += (float)as_half(number) * (float)(k % 2 ? pair.y : pair.x);
    }
  }
  return sums;
}
