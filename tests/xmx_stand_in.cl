// Before the sources of `attend`, on a device without XMX: the built-in in plain OpenCL, so that the form that takes it can
// be held to numpy. Of tests alone: no model has it.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define cl_intel_subgroup_matrix_multiply_accumulate 1
#define cl_intel_subgroup_matrix_multiply_accumulate_tf32 1
#define HALF_float 1  // where states are f32, too: then what f16 operands cost can be told from what f16 states do
#define intel_sub_group_f16_f16_matrix_mad_k16 multiplied

// A row whose column k lane k has, with 16 columns, of which lane n has n by pairs of rows; to its sum.
inline float row_multiplied(short row, int8 columns, float sum) {
  for (uint k = 0; k < 16; k++) {
    const half2 pair = as_half2(columns[k / 2]);
    sum += (float)as_half(intel_sub_group_shuffle(row, k)) * (float)(k % 2 ? pair.y : pair.x);
  }
  return sum;
}

__attribute__((overloadable)) inline float4 multiplied(short4 rows, int8 columns, float4 sums) {
  for (int row = 0; row < 4; row++) sums[row] = row_multiplied(rows[row], columns, sums[row]);
  return sums;
}

__attribute__((overloadable)) inline float8 multiplied(short8 rows, int8 columns, float8 sums) {
  for (int row = 0; row < 8; row++) sums[row] = row_multiplied(rows[row], columns, sums[row]);
  return sums;
}
