/* fake_intel_gpu.c - an OpenCL layer that presents Intel's CPU OpenCL runtime as an Intel GPU.
 *
 * For tests only.  It lets OpenVINO's real GPU plugin compile AND RUN models on a machine without
 * a GPU: the kernels are the plugin's own OpenCL C, built and run by the CPU runtime (PyPI's
 * intel-opencl-rt).  Numbers are meaningful, times are not.  DPAS (XMX) is never advertised, so the
 * plugin uses neither oneDNN nor micro-kernels: those are Xe machine code.
 *
 * `install-emulated` builds it, `emulated` sets the environment that loads it, README.md lists the
 * FAKE_GPU* variables it reads.
 *
 * Formatted by clang-format, {BasedOnStyle: LLVM, IndentWidth: 4, ColumnLimit: 100}.
 */

/* The dispatch table in cl_icd.h names every function OpenCL ever had, the deprecated ones too. */
#define CL_TARGET_OPENCL_VERSION 300
#define CL_USE_DEPRECATED_OPENCL_1_0_APIS
#define CL_USE_DEPRECATED_OPENCL_1_1_APIS
#define CL_USE_DEPRECATED_OPENCL_1_2_APIS
#define CL_USE_DEPRECATED_OPENCL_2_0_APIS
#define CL_USE_DEPRECATED_OPENCL_2_1_APIS
#define CL_USE_DEPRECATED_OPENCL_2_2_APIS
#include <CL/cl_layer.h>

#include <CL/cl_ext.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const cl_icd_dispatch *next; /* below this layer: the next layer or the runtime */
static cl_icd_dispatch mine;        /* what this layer replaces; the loader fills the rest */

static int trace;       /* FAKE_GPU_TRACE is set */
static int passthrough; /* FAKE_GPU=none: only log launches, present nothing, change nothing */
static FILE *run_log;   /* FAKE_GPU_RUNLOG, or NULL */

/* ---- the devices it can show ------------------------------------------------------------- */

struct gpu {
    const char *key, *name;
    cl_uint ip_version, device_id;
    cl_uint eus, threads_per_eu, slices, subslices_per_slice, eus_per_subslice;
    size_t simd[4], simd_count;
    cl_ulong local_memory;
    cl_bool unified_memory;
};

#define IP_VERSION(major, minor, revision) ((major##u << 22) | (minor##u << 14) | revision##u)

static const struct gpu gpus[] = {
    {
        .key = "lnl",
        .name = "Intel(R) Arc(TM) 140V GPU (faked on CPU)",
        .ip_version = IP_VERSION(20, 4, 4),
        .device_id = 0x64A0,
        .eus = 64,
        .threads_per_eu = 8,
        .slices = 1,
        .subslices_per_slice = 8,
        .eus_per_subslice = 8,
        .simd = {16, 32},
        .simd_count = 2,
        .local_memory = 128 * 1024,
        .unified_memory = CL_TRUE,
    },
    {
        .key = "dg2",
        .name = "Intel(R) Arc(TM) A770 Graphics (faked on CPU)",
        .ip_version = IP_VERSION(12, 55, 8),
        .device_id = 0x56A0,
        .eus = 512,
        .threads_per_eu = 8,
        .slices = 8,
        .subslices_per_slice = 4,
        .eus_per_subslice = 16,
        .simd = {8, 16, 32},
        .simd_count = 3,
        .local_memory = 64 * 1024,
        .unified_memory = CL_FALSE,
    },
    {
        .key = "tgl",
        .name = "Intel(R) Iris(R) Xe Graphics (faked on CPU)",
        .ip_version = IP_VERSION(12, 0, 0),
        .device_id = 0x9A49,
        .eus = 96,
        .threads_per_eu = 7,
        .slices = 1,
        .subslices_per_slice = 6,
        .eus_per_subslice = 16,
        .simd = {8, 16, 32},
        .simd_count = 3,
        .local_memory = 64 * 1024,
        .unified_memory = CL_TRUE,
    },
};
static const struct gpu *gpu = &gpus[0];

/* Answers a clGet*Info query the way OpenCL wants it answered. */
static cl_int give(const void *value, size_t size, size_t capacity, void *out, size_t *size_ret) {
    if (out && capacity < size)
        return CL_INVALID_VALUE;
    if (out)
        memcpy(out, value, size);
    if (size_ret)
        *size_ret = size;
    return CL_SUCCESS;
}

#define GIVE(type, value)                                                                          \
    do {                                                                                           \
        type v_ = (value);                                                                         \
        return give(&v_, sizeof v_, capacity, out, size_ret);                                      \
    } while (0)

#define GIVE_TEXT(text) return give((text), strlen(text) + 1, capacity, out, size_ret)

static cl_int CL_API_CALL get_device_ids(cl_platform_id platform, cl_device_type type,
                                         cl_uint capacity, cl_device_id *devices, cl_uint *count) {
    if (type & (CL_DEVICE_TYPE_GPU | CL_DEVICE_TYPE_DEFAULT))
        type = CL_DEVICE_TYPE_ALL; /* below, the device is a CPU */
    return next->clGetDeviceIDs(platform, type, capacity, devices, count);
}

static cl_int CL_API_CALL get_device_info(cl_device_id device, cl_device_info what, size_t capacity,
                                          void *out, size_t *size_ret) {
    if (trace)
        fprintf(stderr, "[fake_gpu] clGetDeviceInfo 0x%x\n", what);
    switch (what) {
    case CL_DEVICE_TYPE:
        GIVE(cl_device_type, CL_DEVICE_TYPE_GPU);
    case CL_DEVICE_VENDOR_ID:
        GIVE(cl_uint, 0x8086);
    case CL_DEVICE_NAME:
        GIVE_TEXT(gpu->name);
    case CL_DRIVER_VERSION:
        GIVE_TEXT("32.0.101.6987");
    case CL_DEVICE_MAX_COMPUTE_UNITS:
        GIVE(cl_uint, gpu->eus);
    case CL_DEVICE_MAX_CLOCK_FREQUENCY:
        GIVE(cl_uint, 2000);
    case CL_DEVICE_MAX_WORK_GROUP_SIZE:
        GIVE(size_t, 1024);
    case CL_DEVICE_LOCAL_MEM_SIZE:
        GIVE(cl_ulong, gpu->local_memory);
    case CL_DEVICE_LOCAL_MEM_TYPE:
        GIVE(cl_device_local_mem_type, CL_LOCAL);
    case CL_DEVICE_HOST_UNIFIED_MEMORY:
        GIVE(cl_bool, gpu->unified_memory);
    case CL_DEVICE_PARTITION_MAX_SUB_DEVICES:
        GIVE(cl_uint, 0);
    case CL_DEVICE_SUB_GROUP_SIZES_INTEL:
        return give(gpu->simd, gpu->simd_count * sizeof(size_t), capacity, out, size_ret);
    case CL_DEVICE_IP_VERSION_INTEL:
        GIVE(cl_uint, gpu->ip_version);
    case CL_DEVICE_ID_INTEL:
        GIVE(cl_uint, gpu->device_id);
    case CL_DEVICE_NUM_SLICES_INTEL:
        GIVE(cl_uint, gpu->slices);
    case CL_DEVICE_NUM_SUB_SLICES_PER_SLICE_INTEL:
        GIVE(cl_uint, gpu->subslices_per_slice);
    case CL_DEVICE_NUM_EUS_PER_SUB_SLICE_INTEL:
        GIVE(cl_uint, gpu->eus_per_subslice);
    case CL_DEVICE_NUM_THREADS_PER_EU_INTEL:
        GIVE(cl_uint, gpu->threads_per_eu);
    case CL_DEVICE_FEATURE_CAPABILITIES_INTEL:
        GIVE(cl_device_feature_capabilities_intel, CL_DEVICE_FEATURE_FLAG_DP4A_INTEL);
    default:
        return next->clGetDeviceInfo(device, what, capacity, out, size_ret);
    }
}

/* ---- kernels keep their program alive ---------------------------------------------------- */

/* The plugin drops its program handle and later asks a kernel for its program in order to clone it.
 * The CPU runtime no longer takes that handle then, where Intel's GPU driver does: so keep every
 * program that has kernels. */

static cl_int CL_API_CALL create_kernels(cl_program program, cl_uint capacity, cl_kernel *kernels,
                                         cl_uint *count) {
    cl_int err = next->clCreateKernelsInProgram(program, capacity, kernels, count);
    if (err == CL_SUCCESS && kernels)
        next->clRetainProgram(program);
    return err;
}

static cl_kernel CL_API_CALL create_kernel(cl_program program, const char *name, cl_int *err) {
    cl_kernel kernel = next->clCreateKernel(program, name, err);
    if (kernel)
        next->clRetainProgram(program);
    return kernel;
}

/* ---- kernel sources: what is put in front, what is replaced ------------------------------ */

/* Intel's GPUs cut a work-group into sub-groups along its linear local id; the CPU runtime only
 * along dimension 0, so a work-group of 1x1x16 gives 16 sub-groups of one item there.  Such a
 * launch is made with the local size flattened into dimension 0 (see `enqueue`), and the id
 * functions, replaced in every source, undo that.  The true local sizes of dimensions 0 and 1
 * travel in the global offset (1 and 2), which the plugin never uses; zero there means: not
 * flattened.
 *
 * native_powr of a negative number and power 2 is x*x on the GPU, and the plugin's RMS kernel
 * relies on it; on the CPU it is NaN.  native_exp, which is in every softmax, is coarse
 * there: with exp, a model in f32 agrees with the CPU plugin to 6e-7 instead of 5e-5. */
static const char prefix[] =
    "__attribute__((always_inline)) size_t fake_lid(uint d) {\n"
    "    size_t x = get_global_offset(1), y = get_global_offset(2), l = get_local_id(0);\n"
    "    return !x ? get_local_id(d)\n"
    "              : d == 0 ? l % x : d == 1 ? l / x % y : d == 2 ? l / (x * y) : 0;\n"
    "}\n"
    "__attribute__((always_inline)) size_t fake_lsz(uint d) {\n"
    "    size_t x = get_global_offset(1), y = get_global_offset(2);\n"
    "    return !x ? get_local_size(d)\n"
    "              : d == 0 ? x : d == 1 ? y : d == 2 ? get_local_size(0) / (x * y) : 1;\n"
    "}\n"
    "__attribute__((always_inline)) size_t fake_gid(uint d) {\n"
    "    return !get_global_offset(1) ? get_global_id(d)\n"
    "                                 : get_group_id(d) * fake_lsz(d) + fake_lid(d);\n"
    "}\n"
    "__attribute__((always_inline)) size_t fake_gsz(uint d) {\n"
    "    return !get_global_offset(1) ? get_global_size(d) : get_num_groups(d) * fake_lsz(d);\n"
    "}\n"
    "#define get_local_id(d) fake_lid(d)\n"
    "#define get_local_size(d) fake_lsz(d)\n"
    "#define get_enqueued_local_size(d) fake_lsz(d)\n"
    "#define get_global_id(d) fake_gid(d)\n"
    "#define get_global_size(d) fake_gsz(d)\n"
    "#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n"
    "__attribute__((overloadable, always_inline)) float fake_powr(float x, float y) {\n"
    "    return y == 2 ? x * x : powr(x, y);\n"
    "}\n"
    "__attribute__((overloadable, always_inline)) half fake_powr(half x, half y) {\n"
    "    return y == 2 ? x * x : powr(x, y);\n"
    "}\n"
    "#define native_powr(x, y) fake_powr(x, y)\n"
    "#define native_exp(x) exp(x)\n"
    "#define reqd_work_group_size(x, y, z) reqd_work_group_size((x) * (y) * (z), 1, 1)\n"
    "#line 1\n";

/* Full unrolling, asked for all over the kernels, costs minutes of compile time per attention
 * kernel here: returns a copy of the text that asks for none. */
static char *without_unrolling(const char *text) {
    static const char what[] = "((opencl_unroll_hint))";
    static const char instead[] = "((opencl_unroll_hint(1)))";
    const size_t what_size = sizeof what - 1, instead_size = sizeof instead - 1;
    size_t hits = 0;
    for (const char *at = text; (at = strstr(at, what)); at += what_size)
        hits++;
    char *copy = malloc(strlen(text) + hits * (instead_size - what_size) + 1), *end = copy;
    for (const char *at; (at = strstr(text, what)); text = at + what_size) {
        memcpy(end, text, at - text);
        end += at - text;
        memcpy(end, instead, instead_size);
        end += instead_size;
    }
    strcpy(end, text);
    return copy;
}

static cl_program CL_API_CALL create_program(cl_context context, cl_uint count, const char **texts,
                                             const size_t *sizes, cl_int *err) {
    char **changed = malloc(count * sizeof *changed);
    const char **all = malloc((count + 1) * sizeof *all);
    all[0] = prefix;
    for (cl_uint i = 0; i < count; i++) {
        char *text = strndup(texts[i], sizes && sizes[i] ? sizes[i] : strlen(texts[i]));
        all[i + 1] = changed[i] = without_unrolling(text);
        free(text);
    }
    cl_program program = next->clCreateProgramWithSource(context, count + 1, all, NULL, err);
    for (cl_uint i = 0; i < count; i++)
        free(changed[i]);
    free(changed);
    free(all);
    return program;
}

/* ---- FAKE_GPU_RUNLOG: a line for a launch (K), copy (C), wait (S), memory (M, F), build (B) */

__attribute__((format(printf, 1, 2))) static void log_run(const char *format, ...) {
    if (!run_log)
        return;
    va_list args;
    va_start(args, format);
    vfprintf(run_log, format, args);
    va_end(args);
    fflush(run_log);
}

/* ---- builds: FAKE_GPU_LOG and FAKE_GPU_DUMP ---------------------------------------------- */

/* The build log of a program, or NULL; the caller frees it. */
static char *build_log(cl_program program, cl_device_id device) {
    size_t size = 0;
    cl_program_build_info what = CL_PROGRAM_BUILD_LOG;
    if (next->clGetProgramBuildInfo(program, device, what, 0, NULL, &size) != CL_SUCCESS || !size)
        return NULL;
    char *log = malloc(size);
    next->clGetProgramBuildInfo(program, device, what, size, log, NULL);
    return log;
}

/* Saves a program as dir/ok_NNNN.cl or dir/failed_NNNN.cl. */
static void dump_program(const char *dir, cl_program program, int ok, double seconds,
                         const char *options, const char *log) {
    static int serial;
    size_t size = 0;
    char path[512];
    if (next->clGetProgramInfo(program, CL_PROGRAM_SOURCE, 0, NULL, &size) != CL_SUCCESS ||
        size <= 1)
        return; /* built from a binary */
    char *source = malloc(size);
    next->clGetProgramInfo(program, CL_PROGRAM_SOURCE, size, source, NULL);
    snprintf(path, sizeof path, "%s/%s_%04d.cl", dir, ok ? "ok" : "failed",
             __atomic_fetch_add(&serial, 1, __ATOMIC_RELAXED)); /* several threads build */
    FILE *file = fopen(path, "w");
    if (file) {
        fwrite(source, 1, size - 1, file);
        fprintf(file, "\n/* built in %.1f s, options: %s\n%s\n*/\n", seconds, options, log);
        fclose(file);
    }
    free(source);
}

/* Logs a build by the name of the kernel in its source that is declared without a macro, if any. */
static void log_build(cl_program program) {
    static const char declared[] = "__kernel void ";
    size_t size = 0;
    if (!run_log || next->clGetProgramInfo(program, CL_PROGRAM_SOURCE, 0, NULL, &size) != CL_SUCCESS)
        return;
    char *source = calloc(size + 1, 1);
    next->clGetProgramInfo(program, CL_PROGRAM_SOURCE, size, source, NULL);
    const char *name = strstr(source, declared);
    name = name ? name + strlen(declared) : "-";
    log_run("B %.*s\n", (int)strcspn(name, "( \n"), name);
    free(source);
}

static cl_int CL_API_CALL build_program(cl_program program, cl_uint count,
                                        const cl_device_id *devices, const char *options,
                                        void(CL_CALLBACK *done)(cl_program, void *), void *user) {
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    cl_int err = next->clBuildProgram(program, count, devices, options, done, user);
    log_build(program);
    clock_gettime(CLOCK_MONOTONIC, &t1);

    const char *dir = getenv("FAKE_GPU_DUMP");
    char *log = count && (dir || err != CL_SUCCESS) ? build_log(program, devices[0]) : NULL;
    if (err != CL_SUCCESS && getenv("FAKE_GPU_LOG"))
        fprintf(stderr, "[fake_gpu] clBuildProgram failed: %d, options: %s\n%.6000s\n", err,
                options ? options : "", log ? log : "");
    if (dir)
        dump_program(dir, program, err == CL_SUCCESS,
                     t1.tv_sec - t0.tv_sec + (t1.tv_nsec - t0.tv_nsec) * 1e-9,
                     options ? options : "", log ? log : "");
    free(log);
    return err;
}

/* ---- FAKE_GPU_ARGS: what every launch is given -------------------------------------------- */

enum { MAX_ARGS = 64, MAX_SHAPES = 256 };

struct arg {
    const void *pointer; /* into USM, or NULL: a scalar */
    size_t size;         /* of the scalar, 8 bytes or less; 0: unset, or larger */
    unsigned char value[8];
};

/* The kernels ever given an argument, the last one used first: a step uses few. */
struct known_kernel {
    struct known_kernel *after;
    cl_kernel kernel;
    struct arg args[MAX_ARGS];
};
static struct known_kernel *known_kernels;
static pthread_mutex_t known_mutex = PTHREAD_MUTEX_INITIALIZER;
static clSetKernelArgMemPointerINTEL_fn next_set_pointer;
static clGetMemAllocInfoINTEL_fn next_alloc_info;

/* The arguments of a kernel; the mutex is held. */
static struct arg *args_of(cl_kernel kernel) {
    struct known_kernel **link = &known_kernels;
    while (*link && (*link)->kernel != kernel)
        link = &(*link)->after;
    struct known_kernel *found = *link;
    if (found)
        *link = found->after;
    else if (!(found = calloc(1, sizeof *found)))
        abort();
    found->kernel = kernel;
    found->after = known_kernels;
    known_kernels = found;
    return found->args;
}

static void keep_arg(cl_kernel kernel, cl_uint index, struct arg arg) {
    pthread_mutex_lock(&known_mutex);
    if (index < MAX_ARGS)
        args_of(kernel)[index] = arg;
    pthread_mutex_unlock(&known_mutex);
}

static cl_int CL_API_CALL set_arg(cl_kernel kernel, cl_uint index, size_t size, const void *value) {
    struct arg arg = {0};
    if (value && size <= sizeof arg.value) {
        arg.size = size;
        memcpy(arg.value, value, size);
    }
    keep_arg(kernel, index, arg);
    return next->clSetKernelArg(kernel, index, size, value);
}

static cl_int CL_API_CALL set_pointer(cl_kernel kernel, cl_uint index, const void *pointer) {
    keep_arg(kernel, index, (struct arg){.pointer = pointer});
    return next_set_pointer(kernel, index, pointer);
}

/* A: an item for every argument: p<allocation>+<offset>/<bytes of the allocation>, s<scalar> or -.
 * I: if the first one can be read here, the integers it starts with. There the plugin puts what a
 * kernel made for any shape must know of this launch's shapes. */
static void log_args(cl_kernel kernel) {
    cl_uint count = 0;
    cl_context context = NULL;
    next->clGetKernelInfo(kernel, CL_KERNEL_NUM_ARGS, sizeof count, &count, NULL);
    next->clGetKernelInfo(kernel, CL_KERNEL_CONTEXT, sizeof context, &context, NULL);
    const int *shapes = NULL;
    size_t shape_count = 0;
    pthread_mutex_lock(&known_mutex);
    const struct arg *args = args_of(kernel);
    log_run("A");
    for (cl_uint i = 0; i < count && i < MAX_ARGS; i++) {
        const char *pointer = args[i].pointer, *base = NULL;
        size_t size = 0;
        cl_unified_shared_memory_type_intel type = 0;
        if (pointer) {
            next_alloc_info(context, pointer, CL_MEM_ALLOC_BASE_PTR_INTEL, sizeof base, &base,
                            NULL);
            next_alloc_info(context, pointer, CL_MEM_ALLOC_SIZE_INTEL, sizeof size, &size, NULL);
            next_alloc_info(context, pointer, CL_MEM_ALLOC_TYPE_INTEL, sizeof type, &type, NULL);
        }
        if (base)
            log_run(" p%p+%td/%zu", (const void *)base, pointer - base, size);
        else if (args[i].size) {
            long long value = 0;
            memcpy(&value, args[i].value, args[i].size);
            log_run(" s%lld", value);
        } else
            log_run(" -");
        if (i == 0 && base && type == CL_MEM_TYPE_HOST_INTEL) {
            shapes = args[i].pointer;
            shape_count = (size - (pointer - base)) / sizeof *shapes;
        }
    }
    pthread_mutex_unlock(&known_mutex);
    log_run("\n");
    for (size_t i = 0; i < shape_count && i < MAX_SHAPES; i++)
        log_run("%s%d", i ? "," : "I ", shapes[i]);
    if (shape_count)
        log_run("\n");
}

/* ---- copies and waits --------------------------------------------------------------------- */

static clEnqueueMemcpyINTEL_fn next_usm_copy;
static clEnqueueMemFillINTEL_fn next_usm_fill;

static cl_int CL_API_CALL usm_copy(cl_command_queue queue, cl_bool blocking, void *to,
                                   const void *from, size_t size, cl_uint n, const cl_event *wait,
                                   cl_event *event) {
    log_run("C usm_memcpy %zu blocking %u\n", size, blocking);
    return next_usm_copy(queue, blocking, to, from, size, n, wait, event);
}

static cl_int CL_API_CALL usm_fill(cl_command_queue queue, void *to, const void *pattern,
                                   size_t pattern_size, size_t size, cl_uint n,
                                   const cl_event *wait, cl_event *event) {
    log_run("C usm_fill %zu\n", size);
    return next_usm_fill(queue, to, pattern, pattern_size, size, n, wait, event);
}

/* ---- memory: a line for what is allocated (M) and what is freed (F) ----------------------- */

static clDeviceMemAllocINTEL_fn next_device_alloc;
static clSharedMemAllocINTEL_fn next_shared_alloc;
static clHostMemAllocINTEL_fn next_host_alloc;
static clMemFreeINTEL_fn next_free, next_blocking_free;

static void *CL_API_CALL device_alloc(cl_context context, cl_device_id device,
                                      const cl_mem_properties_intel *properties, size_t size,
                                      cl_uint alignment, cl_int *err) {
    void *memory = next_device_alloc(context, device, properties, size, alignment, err);
    if (memory)
        log_run("M device %p %zu\n", memory, size);
    return memory;
}

static void *CL_API_CALL shared_alloc(cl_context context, cl_device_id device,
                                      const cl_mem_properties_intel *properties, size_t size,
                                      cl_uint alignment, cl_int *err) {
    void *memory = next_shared_alloc(context, device, properties, size, alignment, err);
    if (memory)
        log_run("M shared %p %zu\n", memory, size);
    return memory;
}

static void *CL_API_CALL host_alloc(cl_context context, const cl_mem_properties_intel *properties,
                                    size_t size, cl_uint alignment, cl_int *err) {
    void *memory = next_host_alloc(context, properties, size, alignment, err);
    if (memory)
        log_run("M host %p %zu\n", memory, size);
    return memory;
}

/* The line comes first: once freed, another thread may get the same address. */

static cl_int CL_API_CALL usm_free(cl_context context, void *memory) {
    log_run("F %p\n", memory);
    return next_free(context, memory);
}

static cl_int CL_API_CALL usm_blocking_free(cl_context context, void *memory) {
    log_run("F %p\n", memory);
    return next_blocking_free(context, memory);
}

static void CL_CALLBACK buffer_gone(cl_mem buffer, void *unused) {
    (void)unused;
    log_run("F %p\n", (void *)buffer);
}

static cl_mem CL_API_CALL create_buffer(cl_context context, cl_mem_flags flags, size_t size,
                                        void *host, cl_int *err) {
    cl_mem buffer = next->clCreateBuffer(context, flags, size, host, err);
    if (buffer) {
        log_run("M buffer %p %zu\n", (void *)buffer, size);
        next->clSetMemObjectDestructorCallback(buffer, buffer_gone, NULL);
    }
    return buffer;
}

/* If `name` is one of the functions above: keeps the real one, returns what stands for it. */
static void *memory_extension(const char *name, void *function) {
    const struct {
        const char *name;
        void **next;
        void *mine;
    } table[] = {
        {"clDeviceMemAllocINTEL", (void **)&next_device_alloc, device_alloc},
        {"clSharedMemAllocINTEL", (void **)&next_shared_alloc, shared_alloc},
        {"clHostMemAllocINTEL", (void **)&next_host_alloc, host_alloc},
        {"clMemFreeINTEL", (void **)&next_free, usm_free},
        {"clMemBlockingFreeINTEL", (void **)&next_blocking_free, usm_blocking_free},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) {
            *table[i].next = function;
            return table[i].mine;
        }
    return NULL;
}

static void *CL_API_CALL get_extension(cl_platform_id platform, const char *name) {
    void *function = next->clGetExtensionFunctionAddressForPlatform(platform, name);
    if (function && !strcmp(name, "clEnqueueMemcpyINTEL")) {
        next_usm_copy = function;
        return usm_copy;
    }
    if (function && !strcmp(name, "clEnqueueMemFillINTEL")) {
        next_usm_fill = function;
        return usm_fill;
    }
    void *logged = function ? memory_extension(name, function) : NULL;
    if (logged)
        return logged;
    if (function && getenv("FAKE_GPU_ARGS") && !strcmp(name, "clSetKernelArgMemPointerINTEL")) {
        next_set_pointer = function;
        next_alloc_info =
            next->clGetExtensionFunctionAddressForPlatform(platform, "clGetMemAllocInfoINTEL");
        return set_pointer;
    }
    return function;
}

static cl_int CL_API_CALL copy_buffer(cl_command_queue queue, cl_mem from, cl_mem to,
                                      size_t from_at, size_t to_at, size_t size, cl_uint n,
                                      const cl_event *wait, cl_event *event) {
    log_run("C copy_buffer %zu\n", size);
    return next->clEnqueueCopyBuffer(queue, from, to, from_at, to_at, size, n, wait, event);
}

static cl_int CL_API_CALL write_buffer(cl_command_queue queue, cl_mem buffer, cl_bool blocking,
                                       size_t at, size_t size, const void *from, cl_uint n,
                                       const cl_event *wait, cl_event *event) {
    log_run("C write_buffer %zu blocking %u\n", size, blocking);
    return next->clEnqueueWriteBuffer(queue, buffer, blocking, at, size, from, n, wait, event);
}

static cl_int CL_API_CALL read_buffer(cl_command_queue queue, cl_mem buffer, cl_bool blocking,
                                      size_t at, size_t size, void *to, cl_uint n,
                                      const cl_event *wait, cl_event *event) {
    log_run("C read_buffer %zu blocking %u\n", size, blocking);
    return next->clEnqueueReadBuffer(queue, buffer, blocking, at, size, to, n, wait, event);
}

static void *CL_API_CALL map_buffer(cl_command_queue queue, cl_mem buffer, cl_bool blocking,
                                    cl_map_flags flags, size_t at, size_t size, cl_uint n,
                                    const cl_event *wait, cl_event *event, cl_int *err) {
    log_run("C map_buffer %zu blocking %u\n", size, blocking);
    return next->clEnqueueMapBuffer(queue, buffer, blocking, flags, at, size, n, wait, event, err);
}

static cl_int CL_API_CALL fill_buffer(cl_command_queue queue, cl_mem buffer, const void *pattern,
                                      size_t pattern_size, size_t at, size_t size, cl_uint n,
                                      const cl_event *wait, cl_event *event) {
    log_run("C fill_buffer %zu\n", size);
    return next->clEnqueueFillBuffer(queue, buffer, pattern, pattern_size, at, size, n, wait,
                                     event);
}

static cl_int CL_API_CALL finish(cl_command_queue queue) {
    log_run("S finish\n");
    return next->clFinish(queue);
}

static cl_int CL_API_CALL wait_for_events(cl_uint n, const cl_event *events) {
    log_run("S wait %u\n", n);
    return next->clWaitForEvents(n, events);
}

/* ---- launches ---------------------------------------------------------------------------- */

/* The sub-group size a kernel was compiled for, 0 if it asked for none. */
static size_t sub_group_size(cl_command_queue queue, cl_kernel kernel) {
    cl_device_id device;
    size_t simd = 0;
    next->clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof device, &device, NULL);
    next->clGetKernelSubGroupInfo(kernel, device, CL_KERNEL_COMPILE_SUB_GROUP_SIZE_INTEL, 0, NULL,
                                  sizeof simd, &simd, NULL);
    return simd;
}

/* Logs a launch with the sizes the plugin asked for, flattened or not. */
static void log_launch(cl_kernel kernel, cl_uint dims, const size_t *global, const size_t *local,
                       size_t simd, int flat, cl_int err) {
    char name[256] = "?";
    size_t g[3] = {1, 1, 1}, l[3] = {0, 0, 0};
    if (!run_log && !trace)
        return;
    next->clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof name, name, NULL);
    for (cl_uint i = 0; i < dims; i++) {
        g[i] = global[i];
        l[i] = local ? local[i] : 0;
    }
    log_run("K %s %zu,%zu,%zu/%zu,%zu,%zu -> %d\n", name, g[0], g[1], g[2], l[0], l[1], l[2], err);
    if (next_alloc_info)
        log_args(kernel);
    if (trace) {
        fprintf(stderr, "[fake_gpu] run %s simd %zu%s", name, simd, flat ? " flat" : "");
        for (cl_uint i = 0; i < dims; i++)
            fprintf(stderr, " %zu/%zu", g[i], l[i]);
        fprintf(stderr, " -> %d\n", err);
    }
}

static cl_int CL_API_CALL enqueue(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                  const size_t *offset, const size_t *global, const size_t *local,
                                  cl_uint n, const cl_event *wait, cl_event *event) {
    size_t g[3] = {1, 1, 1}, l[3] = {1, 1, 1}, true_local[3] = {0, 0, 0}, simd = 0;
    int flat = 0;
    if (local && !offset && !passthrough) {
        simd = sub_group_size(queue, kernel);
        for (cl_uint i = 0; i < dims; i++) {
            g[i] = global[i];
            l[i] = local[i];
        }
        /* Dimension 0 already holds whole sub-groups: leave it alone. */
        size_t items = l[0] * l[1] * l[2];
        int divides = g[0] % l[0] == 0 && g[1] % l[1] == 0 && g[2] % l[2] == 0;
        flat = items != l[0] && (!simd || l[0] % simd) && divides;
        if (flat) {
            true_local[1] = l[0];
            true_local[2] = l[1];
            g[0] = g[0] / l[0] * items;
            g[1] /= l[1];
            g[2] /= l[2];
            l[0] = items;
            l[1] = l[2] = 1;
        }
    }
    cl_int err =
        flat ? next->clEnqueueNDRangeKernel(queue, kernel, 3, true_local, g, l, n, wait, event)
             : next->clEnqueueNDRangeKernel(queue, kernel, dims, offset, global, local, n, wait,
                                            event);
    log_launch(kernel, dims, global, local, simd, flat, err);
    return err;
}

/* Queues are in order, as the plugin asks for on chips with XMX. Out of order, which it asks for on others, this
 * runtime starts kernels of long graphs before those they read from have ended: results are wrong, and differ by run. */

#define OUT_OF_ORDER ((cl_command_queue_properties)CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE)

static cl_command_queue CL_API_CALL create_queue(cl_context context, cl_device_id device,
                                                 cl_command_queue_properties wanted, cl_int *err) {
    return next->clCreateCommandQueue(context, device, wanted & ~OUT_OF_ORDER, err);
}

static cl_command_queue CL_API_CALL create_queue_with(cl_context context, cl_device_id device,
                                                      const cl_queue_properties *wanted,
                                                      cl_int *err) {
    cl_queue_properties given[33] = {0};
    for (int i = 0; wanted && wanted[i] && i < 32; i += 2) {
        given[i] = wanted[i];
        given[i + 1] = wanted[i] == CL_QUEUE_PROPERTIES ? wanted[i + 1] & ~OUT_OF_ORDER : wanted[i + 1];
    }
    return next->clCreateCommandQueueWithProperties(context, device, wanted ? given : NULL, err);
}

/* ---- the layer's own entry points -------------------------------------------------------- */

CL_API_ENTRY cl_int CL_API_CALL clGetLayerInfo(cl_layer_info what, size_t capacity, void *out,
                                               size_t *size_ret) {
    if (what == CL_LAYER_API_VERSION)
        GIVE(cl_layer_api_version, CL_LAYER_API_VERSION_100);
    if (what == CL_LAYER_NAME)
        GIVE_TEXT("fake_intel_gpu");
    return CL_INVALID_VALUE;
}

CL_API_ENTRY cl_int CL_API_CALL clInitLayer(cl_uint entries, const cl_icd_dispatch *target,
                                            cl_uint *entries_ret, const cl_icd_dispatch **layer) {
    (void)entries;
    if (!target || !entries_ret || !layer)
        return CL_INVALID_VALUE;
    next = target;
    *layer = &mine;
    *entries_ret = sizeof mine / sizeof(void *);

    trace = getenv("FAKE_GPU_TRACE") != NULL;
    const char *log_path = getenv("FAKE_GPU_RUNLOG");
    if (log_path)
        run_log = fopen(log_path, "a");
    if (run_log) {
        mine.clGetExtensionFunctionAddressForPlatform = get_extension;
        mine.clCreateBuffer = create_buffer;
        mine.clEnqueueCopyBuffer = copy_buffer;
        mine.clEnqueueWriteBuffer = write_buffer;
        mine.clEnqueueReadBuffer = read_buffer;
        mine.clEnqueueMapBuffer = map_buffer;
        mine.clEnqueueFillBuffer = fill_buffer;
        mine.clFinish = finish;
        mine.clWaitForEvents = wait_for_events;
        mine.clEnqueueNDRangeKernel = enqueue;
        if (getenv("FAKE_GPU_ARGS"))
            mine.clSetKernelArg = set_arg;
    }

    const char *key = getenv("FAKE_GPU");
    passthrough = key && !strcmp(key, "none");
    if (passthrough) {
        if (run_log || getenv("FAKE_GPU_DUMP"))
            mine.clBuildProgram = build_program;
        return CL_SUCCESS;
    }
    for (size_t i = 0; key && i < sizeof gpus / sizeof *gpus; i++)
        if (!strcmp(key, gpus[i].key))
            gpu = &gpus[i];
    mine.clGetDeviceIDs = get_device_ids;
    mine.clGetDeviceInfo = get_device_info;
    mine.clBuildProgram = build_program;
    mine.clCreateKernelsInProgram = create_kernels;
    mine.clCreateKernel = create_kernel;
    mine.clCreateProgramWithSource = create_program;
    mine.clEnqueueNDRangeKernel = enqueue;
    mine.clCreateCommandQueue = create_queue;
    mine.clCreateCommandQueueWithProperties = create_queue_with;
    return CL_SUCCESS;
}

/* The loader of OpenCL 3.1 (the one in intel-opencl-rt) wants these two instead. */
CL_API_ENTRY cl_int CL_API_CALL clInitLayerWithProperties(cl_uint entries,
                                                          const cl_icd_dispatch *target,
                                                          cl_uint *entries_ret,
                                                          const cl_icd_dispatch **layer,
                                                          const cl_ulong *properties) {
    (void)properties;
    return clInitLayer(entries, target, entries_ret, layer);
}

CL_API_ENTRY cl_int CL_API_CALL clDeinitLayer(void) { return CL_SUCCESS; }
