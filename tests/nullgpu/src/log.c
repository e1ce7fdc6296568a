/* The log of events, errors, refusals. */
#include "nullgpu.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static __thread int last_error = 0;
static int file = -1;

__attribute__((constructor)) static void open_log(void) {
    const char *path = getenv("NULLGPU_LOG");
    if (path && *path) file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

/* Append a line in one write, so that lines of several threads do not mix. */
static void append(const char *start, const char *format, va_list values, const char *end) {
    char line[2048];
    int n = snprintf(line, 256, "%s", start);
    int m = vsnprintf(line + n, sizeof line - n - 16, format, values);
    n += m < (int)sizeof line - n - 16 ? m : (int)sizeof line - n - 17;
    n += snprintf(line + n, 16, "%s\n", end);
    if (write(file, line, n) != n) file = -1;
}

void record(const char *format, ...) {
    if (file < 0) return;
    va_list values;
    va_start(values, format);
    append("{", format, values, "}");
    va_end(values);
}

int fail(int error) {
    if (error) last_error = error;
    return error;
}

API int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}

API int cudaPeekAtLastError(void) {
    return last_error;
}

/* The errors that it gives, in CUDA's words where those are known. */
API const char *cudaGetErrorString(int error) {
    switch (error) {
    case 0: return "no error";
    case cudaErrorInvalidValue: return "invalid argument (null GPU)";
    case cudaErrorMemoryAllocation: return "out of memory (null GPU)";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument (null GPU)";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version (null GPU)";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected (null GPU)";
    case cudaErrorInvalidDevice: return "invalid device ordinal (null GPU)";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle (null GPU)";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered (null GPU)";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing (null GPU)";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture (null GPU)";
    case cudaErrorStreamCaptureImplicit:
        return "operation would make the legacy stream depend on a capturing blocking stream (null GPU)";
    default: return "error of the null GPU";
    }
}

API const char *cudaGetErrorName(int error) {
    return cudaGetErrorString(error);
}

API CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString(error);
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char **text) {
    return cuGetErrorString(error, text);
}

void break_capture(void); /* stream.c */

int refuse(int error, const char *format, ...) {
    char why[512];
    va_list values;
    va_start(values, format);
    vsnprintf(why, sizeof why, format, values);
    va_end(values);
    fprintf(stderr, "null GPU refuses: %s\n", why);
    record("\"event\": \"refused\", \"error\": %d, \"why\": \"%s\"", error, why);
    break_capture();
    return error;
}
