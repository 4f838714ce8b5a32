// One softmax of the parts that `attend` made: a sub-group joins a query head.
//   parts   PARTS records of RECORD floats for each query head
//   unused  tells how many query heads there are, to OpenVINO
//   output  (QUERY_HEADS, HEAD_DIM)
__attribute__((intel_reqd_sub_group_size(LANES)))
__kernel void ovtq_join(const __global REAL* parts, const __global INPUT1_TYPE* unused, __global OUTPUT0_TYPE* output) {
  const uint lane = get_sub_group_local_id(), head = get_group_id(0);
  const __global float* record = (const __global float*)parts + head * PARTS * RECORD;
  float largest = NOWHERE, total = 0, x[SHARE];
  FOR_SHARE x[i] = 0;
  for (int n = 0; n < PARTS; n++) largest = fmax(largest, record[n * RECORD + HEAD_DIM]);
  for (int n = 0; n < PARTS; n++) {
    const float factor = native_exp(record[n * RECORD + HEAD_DIM] - largest);
    total += factor * record[n * RECORD + HEAD_DIM + 1];
    FOR_SHARE x[i] += factor * record[n * RECORD + SHARE * lane + i];
  }
  FOR_SHARE output[head * HEAD_DIM + SHARE * lane + i] = (OUTPUT0_TYPE)(x[i] / total);
}
