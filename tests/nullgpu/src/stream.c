/* Streams, events, synchronisation, graph capture.
 *
 * Nothing runs, so nothing is ever waited for; what counts is what a program asks for. One capture at a time. */
#include "nullgpu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct event { unsigned long long capture; };
struct graph { int nodes; };

static struct stream legacy[MAX_DEVICES];
static int streams = 0;

/* the capture that is going on; id 0: none */
static struct { unsigned long long id; struct stream *origin; pthread_t thread; int mode, nodes; bool broken; } capture;
static unsigned long long captures = 0;
static __thread int thread_mode = cudaStreamCaptureModeGlobal;

struct stream *stream_of(const void *handle) {
    if ((uintptr_t)handle > 2) return (struct stream *)handle; /* 0, 1, 2: the default streams */
    legacy[current].device = current;
    return &legacy[current];
}

static bool capturing(const struct stream *s) {
    return capture.id && s->capture == capture.id;
}

unsigned long long count_node(struct stream *s) {
    if (!capturing(s)) return 0;
    capture.nodes++;
    return capture.id;
}

void break_capture(void) {
    if (capture.id) capture.broken = true;
}

int unsafe_in_capture(const char *call) {
    if (!capture.id) return 0;
    if (thread_mode == cudaStreamCaptureModeRelaxed || capture.mode == cudaStreamCaptureModeRelaxed) return 0;
    if (capture.mode != cudaStreamCaptureModeGlobal && !pthread_equal(capture.thread, pthread_self())) return 0;
    return refuse(cudaErrorStreamCaptureUnsupported, "%s while a stream is captured", call);
}

/* A call that waits for the device. */
static int wait(const char *call, const struct stream *s) {
    if (s && capturing(s))
        return fail(refuse(cudaErrorStreamCaptureUnsupported, "%s of a stream that is captured", call));
    int error = fail(unsafe_in_capture(call));
    if (!error) record("\"event\": \"sync\", \"call\": \"%s\", \"device\": %d", call, current);
    return error;
}

/* ---- streams */

API int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    struct stream *s = calloc(1, sizeof *s);
    s->number = __atomic_add_fetch(&streams, 1, __ATOMIC_RELAXED);
    s->device = current;
    *stream = s;
    return 0;
}

API int cudaStreamCreateWithFlags(void **s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
API int cudaStreamCreate(void **s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API int cudaStreamDestroy(void *stream) { return 0; } /* not freed: a late use is then still seen */

API int cudaStreamGetPriority(void *stream, int *priority) {
    *priority = 0;
    return 0;
}

API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}

API int cudaStreamQuery(void *stream) {
    return capturing(stream_of(stream)) ? wait("cudaStreamQuery", stream_of(stream)) : 0;
}

API int cudaStreamSynchronize(void *stream) { return wait("cudaStreamSynchronize", stream_of(stream)); }
API int cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize", NULL); }

/* ---- events */

API int cudaEventCreateWithFlags(void **event, unsigned flags) {
    *event = calloc(1, sizeof(struct event));
    return 0;
}

API int cudaEventCreate(void **event) { return cudaEventCreateWithFlags(event, 0); }

API int cudaEventDestroy(void *event) {
    free(event);
    return 0;
}

API int cudaEventRecord(void *event, void *stream) {
    ((struct event *)event)->capture = stream_of(stream)->capture;
    return 0;
}

API int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }

/* A stream that waits for an event of a captured one joins the capture. */
API int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
    struct stream *s = stream_of(stream);
    unsigned long long of = ((struct event *)event)->capture;
    if (capture.id && of == capture.id) s->capture = of;
    return 0;
}

API int cudaEventQuery(void *event) {
    return fail(unsafe_in_capture("cudaEventQuery"));
}

API int cudaEventSynchronize(void *event) {
    return wait("cudaEventSynchronize", NULL);
}

API int cudaEventElapsedTime(float *milliseconds, void *first, void *last) {
    *milliseconds = 1;
    return 0;
}

API int cudaEventElapsedTime_v2(float *milliseconds, void *first, void *last) {
    return cudaEventElapsedTime(milliseconds, first, last);
}

API int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *with) {
    call(with);
    return 0;
}

/* ---- capture */

API int cudaThreadExchangeStreamCaptureMode(int *mode) {
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return 0;
}

API int cudaStreamBeginCapture(void *stream, int mode) {
    struct stream *s = stream_of(stream);
    if ((uintptr_t)stream <= 2) return fail(refuse(cudaErrorStreamCaptureUnsupported, "capture of a default stream"));
    if (capture.id) return fail(refuse(cudaErrorStreamCaptureUnsupported, "a second capture at once"));
    capture.id = s->capture = ++captures;
    capture.origin = s, capture.thread = pthread_self(), capture.mode = mode, capture.nodes = 0, capture.broken = false;
    record("\"event\": \"capture_begin\", \"capture\": %llu, \"device\": %d", capture.id, s->device);
    return 0;
}

API int cudaStreamEndCapture(void *stream, void **graph) {
    struct stream *s = stream_of(stream);
    *graph = NULL;
    if (!capturing(s)) return fail(refuse(cudaErrorIllegalState, "the end of a capture that was not begun"));
    bool broken = capture.broken;
    record("\"event\": \"capture_end\", \"capture\": %llu, \"nodes\": %d, \"ok\": %s", capture.id, capture.nodes,
           broken ? "false" : "true");
    if (!broken) {
        struct graph *g = calloc(1, sizeof *g);
        g->nodes = capture.nodes;
        *graph = g;
    }
    capture.id = s->capture = 0;
    return broken ? fail(cudaErrorStreamCaptureInvalidated) : 0;
}

static int status_of(const struct stream *s) {
    if (!capturing(s)) return cudaStreamCaptureStatusNone;
    return capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

API int cudaStreamIsCapturing(void *stream, int *status) {
    *status = status_of(stream_of(stream));
    return 0;
}

API int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void **needs,
                                 const void **edges, size_t *n) {
    *status = status_of(stream_of(stream));
    if (id) *id = *status ? capture.id : 0;
    if (graph) *graph = NULL;
    if (n) *n = 0;
    return 0;
}

API int cudaStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id, void **graph, const void **needs,
                                    const void **edges, size_t *n) { /* as CUDA 12 names it */
    return cudaStreamGetCaptureInfo(stream, status, id, graph, needs, edges, n);
}

API int cudaStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph, const void **needs,
                                    size_t *n) { /* as CUDA 12 names it, without edges */
    return cudaStreamGetCaptureInfo(stream, status, id, graph, needs, NULL, n);
}

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = status_of(stream_of(stream));
    return CUDA_SUCCESS;
}

/* ---- graphs */

API int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    struct graph *g = calloc(1, sizeof *g);
    *g = *(struct graph *)graph;
    *executable = g;
    return 0;
}

API int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}

API int cudaGraphLaunch(void *executable, void *stream) {
    struct stream *s = stream_of(stream);
    if (s->device != current)
        return fail(refuse(cudaErrorInvalidResourceHandle, "a graph on a stream of another device"));
    record("\"event\": \"replay\", \"nodes\": %d, \"device\": %d, \"stream\": %d", ((struct graph *)executable)->nodes,
           current, s->number);
    return 0;
}

API int cudaGraphGetNodes(void *graph, void *nodes, size_t *n) {
    *n = ((struct graph *)graph)->nodes;
    return 0;
}

API int cudaGraphDestroy(void *graph) {
    free(graph);
    return 0;
}

API int cudaGraphExecDestroy(void *executable) { return cudaGraphDestroy(executable); }
API int cudaGraphRetainUserObject(void *graph, void *object, unsigned n, unsigned flags) { return 0; }
API int cudaUserObjectCreate(void **object, void *p, void (*end)(void *), unsigned n, unsigned flags) { return 0; }
API int cudaUserObjectRelease(void *object, unsigned n) { return 0; }
API int cudaProfilerStart(void) { return 0; }
API int cudaProfilerStop(void) { return 0; }
