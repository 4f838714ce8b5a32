// What tells that these kernels run: where they do not, OpenVINO inverts the 2 that it is given, or refuses to.
__kernel void ovtq_guard(const __global INPUT0_TYPE* two, __global OUTPUT0_TYPE* output) { output[0] = (OUTPUT0_TYPE)1; }
