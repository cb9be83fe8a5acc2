/* weightd client library: the C ABI.
 *
 * A trainer rank opens an actor, registers its shards once and calls sync for every version. An
 * inference rank opens an engine, registers its parameters once and is then driven by the daemon.
 * Native threads keep the connection to the daemon and to the worker alive, re-attach after a
 * restart of either and never need the caller's interpreter lock.
 *
 * Conventions
 * - Every function that can fail returns NULL on success or an error that the caller frees with
 *   weightd_error_free.
 * - Strings are UTF-8, NUL-terminated. Strings passed in are copied. Strings handed out as `char*`
 *   are freed with weightd_string_free; those handed out as `const char*` live as long as the
 *   object they belong to.
 * - Shapes, origins, extents and strides are in elements, outermost dimension first; ranges are
 *   half-open.
 * - Memory that is lent stays the caller's: it must stay valid and at the same address until the
 *   actor or engine is closed. A shared-memory descriptor is duplicated; the caller keeps its own.
 * - Functions on one object may be called from any thread, one at a time, except *_cancel and
 *   *_state, which may be called at any time. Objects are independent.
 * - After fork() the objects are unusable in the child, which inherits no descriptor of theirs; the
 *   parent goes on. In the child every call fails with FAILED_PRECONDITION FORKED, a state is {}
 *   and close only frees the handle. New objects are refused alike in a child of a process in which
 *   one had connected: gRPC's threads do not survive the fork. Start such processes by spawn or
 *   exec.
 */
#ifndef WEIGHTD_WEIGHTD_H_
#define WEIGHTD_WEIGHTD_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* NOLINTBEGIN(readability-identifier-naming): names of a C ABI */

#if defined(__GNUC__)
#define WEIGHTD_API __attribute__((visibility("default")))
#else
#define WEIGHTD_API
#endif

#define WEIGHTD_ABI_VERSION 3
#define WEIGHTD_MAX_DIMS 8

/* Version of the library, e.g. "0.1.0", and of this ABI. Neither blocks nor fails. */
WEIGHTD_API const char* weightd_version(void);
WEIGHTD_API int weightd_abi_version(void);

/* ---- errors ---- */
typedef struct weightd_error weightd_error;

/* google.rpc code (3 INVALID_ARGUMENT, 4 DEADLINE_EXCEEDED, 5 NOT_FOUND, 6 ALREADY_EXISTS, 8
 * RESOURCE_EXHAUSTED, 9 FAILED_PRECONDITION, 10 ABORTED, 13 INTERNAL, 14 UNAVAILABLE, 1 CANCELLED).
 */
WEIGHTD_API int weightd_error_code(const weightd_error* error);
/* One field of the error: "reason", "message", "tensor", "rank", "phase", "peer", "remedy", or
 * "result" (JSON of the sync result with every replica's outcome, when there is one). Empty string
 * if it does not apply. The text lives as long as the error. Reasons are stable upper-case tokens,
 * e.g. "DAEMON_LOST"; messages may change. */
WEIGHTD_API const char* weightd_error_field(const weightd_error* error, const char* field);
WEIGHTD_API void weightd_error_free(weightd_error* error);
WEIGHTD_API void weightd_string_free(char* text);

/* ---- memory ---- */
/* Element types: the values of weightd.v1.DType (1 float32, 2 float16, 3 bfloat16, 4 float64, 5
 * int8, 6 uint8, 7 int16, 8 int32, 9 int64, 10 bool, 11 float8_e4m3fn, 12 float8_e5m2). */
typedef int32_t weightd_dtype;

/* Kinds of memory. */
#define WEIGHTD_SPACE_HOST 0
#define WEIGHTD_SPACE_CUDA 1

/* Where a block of elements lies. In GPU memory only `address` and `strides` count: the library
 * finds the allocation behind it and lends that to the worker of its GPU. All memory of one rank
 * lies on one device. */
typedef struct weightd_memory {
  int32_t space;         /* WEIGHTD_SPACE_HOST or WEIGHTD_SPACE_CUDA */
  int32_t fd;            /* shared memory object to lend (memfd, /dev/shm file); -1: staged */
  uint64_t fd_size;      /* bytes of the shared memory object */
  uint64_t offset_bytes; /* of the first element, from the start of the object */
  const void* address;   /* of the first element in this process; NULL if there is no memory yet
                            (staged at sync time) */
  int64_t strides[WEIGHTD_MAX_DIMS]; /* in elements, one per dimension */
} weightd_memory;

/* A half-open box of a tensor that this rank holds, and where it lies. */
typedef struct weightd_shard {
  int64_t origin[WEIGHTD_MAX_DIMS];
  int64_t extent[WEIGHTD_MAX_DIMS];
  weightd_memory memory;
} weightd_shard;

/* One tensor of the trainer. num_shards is 0 on ranks that hold nothing of it. */
typedef struct weightd_tensor {
  const char* name;
  weightd_dtype dtype;
  int32_t num_dims;
  int64_t shape[WEIGHTD_MAX_DIMS]; /* global */
  int32_t num_shards;
  const weightd_shard* shards;
} weightd_tensor;

/* Whether a worker can map so much GPU memory from `address` on; 0 bytes: whether any lies there.
 * \error UNIMPLEMENTED MEMORY if not (sleep mode, cudaMallocAsync, managed memory), with the reason
 * \error INVALID_ARGUMENT MEMORY_MOVED if nothing lies there: it was freed, or sleeps
 * \error FAILED_PRECONDITION DEVICE if the process has not loaded the CUDA driver */
WEIGHTD_API weightd_error* weightd_gpu_check(const void* address, uint64_t size_bytes);
/* Allocates memory that a worker can map, on the GPU of which `like` is memory; weightd_gpu_free
 * frees it, after the engine was closed. May block for milliseconds.
 * \error RESOURCE_EXHAUSTED GPU_MEMORY with what is needed and free; else as weightd_gpu_check */
WEIGHTD_API weightd_error* weightd_gpu_allocate(const void* like, uint64_t size_bytes,
                                                void** address);
WEIGHTD_API void weightd_gpu_free(void* address); /* NULL is ignored */

/* ---- workers ---- */
/* Who starts the worker of this rank's device, the process that maps and copies its memory. */
#define WEIGHTD_WORKER_DAEMON 0
/* This library, as a child of this process, if the daemon does not serve the device itself and no
 * other client serves it: from weightd_*_register until the object is closed, started again when it
 * dies. The child has a session of its own and writes to standard error only; it ends when this
 * process does. Its exit status is waited for by a native thread. The program is `worker_binary`,
 * else $WEIGHTD_BIN, else "weightd" beside this library, in ../bin from there, or in PATH. The
 * worker's socket lies in a directory of its own in $XDG_RUNTIME_DIR or /tmp, which other clients
 * of the device must reach. */
#define WEIGHTD_WORKER_SPAWN 1

/* ---- actor (trainer rank) ---- */
typedef struct weightd_actor weightd_actor;

typedef struct weightd_actor_options {
  const char* address;  /* "unix:/run/weightd/weightd.sock" or "127.0.0.1:7077"; NULL =
                           $WEIGHTD_ADDRESS, then the default */
  const char* model;    /* key of the model; engines must use the same */
  const char* group;    /* id of this start of the trainer, equal on all ranks, drawn by rank 0 */
  uint64_t group_order; /* creation of the group, microseconds since 1970; equal on all ranks */
  int32_t rank;
  int32_t world_size;
  int32_t connect_timeout_ms; /* 0 = 10,000 */
  const char* device; /* that holds the rank's memory, as the daemon names it: "host", "host.1" or a
                         GPU UUID; NULL or "" = "host" */
  int32_t worker;     /* WEIGHTD_WORKER_DAEMON or WEIGHTD_WORKER_SPAWN */
  const char* worker_binary; /* program of a worker that is spawned; NULL or "": see there */
} weightd_actor_options;

/* Connects and shakes hands. Blocks up to connect_timeout_ms, during which a daemon that is not
 * there yet is tried again. From then on the session comes back by itself: after the daemon or its
 * worker was lost it connects, registers and lends its memory again, with a backoff of 50 ms to 1
 * s.
 * \error UNAVAILABLE DAEMON_LOST if no daemon answers at the address
 * \error FAILED_PRECONDITION WORKER_START, before anything else, if there is no program for
 *   WEIGHTD_WORKER_SPAWN; names the places that were looked at
 * \error FAILED_PRECONDITION FORKED in a child of a process in which one had connected
 * \error FAILED_PRECONDITION PROTOCOL_VERSION if daemon and library speak different protocols
 * \error ALREADY_EXISTS DUPLICATE_RANK, INVALID_ARGUMENT WORLD_SIZE, ABORTED FENCED: see
 *   actor.proto */
WEIGHTD_API weightd_error* weightd_actor_open(const weightd_actor_options* options,
                                              weightd_actor** actor);

/* Registers all tensors of this rank and lends their memory; replaces an earlier registration.
 * Blocks until daemon and worker have taken them (every rank registers by itself; none waits for
 * another). The arrays are copied. Every tensor's name must be unique and not empty, its boxes must
 * lie inside its shape, and a lent object must be as large as offset and strides say: all of that
 * is checked here, before the daemon sees anything. A shard with fd -1 is staged: copied through
 * the worker's ring during a sync, from `address` if it is not NULL, otherwise from the memory that
 * the sync is given. The soft limit of open files is raised when it is too low.
 * \error INVALID_ARGUMENT SHAPE/DTYPE/DUPLICATE_TENSOR/TABLE_MISMATCH naming the tensor
 * \error INVALID_ARGUMENT UNKNOWN_DEVICE if the daemon has no worker for the device; lists those
 *   that it serves. Not with WEIGHTD_WORKER_SPAWN
 * \error FAILED_PRECONDITION WORKER_START if the worker that this process was asked to start ends
 *   three times before the daemon has taken it, or is not taken within 30 s
 * \error INVALID_ARGUMENT SHARED_MEMORY naming the tensor if its object is smaller than it should
 *   be
 * \error UNIMPLEMENTED MEMORY naming the tensor if no other process can map its GPU memory (sleep
 *   mode, cudaMallocAsync, managed memory)
 * \error INVALID_ARGUMENT DEVICE if the tensors of the rank lie on several devices
 * \error RESOURCE_EXHAUSTED FILE_DESCRIPTORS if the hard limit cannot hold the descriptors
 * \error UNAVAILABLE DAEMON_LOST, DEADLINE_EXCEEDED DEADLINE if daemon or worker do not answer */
WEIGHTD_API weightd_error* weightd_actor_register(weightd_actor* actor,
                                                  const weightd_tensor* tensors,
                                                  size_t num_tensors);

/* Memory of a staged shard for one sync. */
typedef struct weightd_staged {
  uint32_t tensor; /* position in the registered array */
  uint32_t shard;
  const void* address;
  int64_t strides[WEIGHTD_MAX_DIMS];
} weightd_staged;

typedef struct weightd_sync_options {
  uint64_t version;
  uint32_t require_replicas; /* 0 = all */
  int32_t check_replicas;    /* nonzero: compare replicated shards first */
  const weightd_staged* staged;
  size_t num_staged;
  void* cuda_stream; /* GPU memory: the CUstream whose work so far produces the weights; NULL is the
                        default stream. The transfer waits for it, the caller does not. */
  const char* refuse_reason; /* not NULL: this rank refuses (e.g. "MEMORY_MOVED"); the sync fails on
                                every rank */
  const char* refuse_message;
  const char* refuse_tensor;
  const char* refuse_remedy;
} weightd_sync_options;

/* Starts a sync. Does not block; with GPU memory an event is recorded on `cuda_stream`. The
 * registered memory must not change until the sync has ended;
 * staged memory is not read any more once weightd_actor_sync_wait has returned 1. While the daemon
 * or worker is being replaced the sync waits for the registration to come back, for at most
 * connect_timeout_ms. A staged shard without memory makes the sync fail on every rank with
 * MISSING_TENSOR.
 * \error FAILED_PRECONDITION if nothing is registered or a sync is running */
WEIGHTD_API weightd_error* weightd_actor_sync_begin(weightd_actor* actor,
                                                    const weightd_sync_options* options);

/* Waits for the sync. Returns 0 while it runs (timeout), 1 when it ended. Then either *result_json
 * is the result (caller frees) or *error is set. timeout_ms < 0 waits without limit. Result:
 *   {"version", "attempt", "bytes", "path_bytes": {"shm": bytes, ...}, "pause_us",
 *    "phases": {"admit": us, ...}, "replicas": [
 *     {"engine", "dp_rank", "committed", "version", "state", "verified", "caches_reset", "error"}]}
 * `attempt` is "EPOCH.COUNTER"; `phases` has microseconds and only the phases that ran;
 * `caches_reset` is a list; a replica's `error` is null or
 *   {"code", "reason", "message", "tensor", "rank", "phase", "peer", "remedy"}.
 * An error has the same JSON as its field "result" when the daemon answered. When the daemon is
 * lost the sync ends at once with UNAVAILABLE DAEMON_LOST and the phase that it was in. */
WEIGHTD_API int weightd_actor_sync_wait(weightd_actor* actor, int timeout_ms, char** result_json,
                                        weightd_error** error);

/* Asks the daemon to stop the running sync; the sync then ends with CANCELLED. Any thread, any
 * time. */
WEIGHTD_API void weightd_actor_sync_cancel(weightd_actor* actor);

/* State as JSON: {"connected","registered","phase","bytes_done","bytes_total","worker","error"}.
 * `phase` is "" when no sync runs, `worker` the device of the worker that holds the memory, `error`
 * null or why the session is not as it should be (as a replica's error above). Never blocks. Caller
 * frees. */
WEIGHTD_API char* weightd_actor_state(weightd_actor* actor);

/* Ends the session, takes the lent memory back (the worker confirms the unmapping or is seen dead;
 * blocks for at most 5 s) and frees the object. NULL is ignored. */
WEIGHTD_API void weightd_actor_close(weightd_actor* actor);

/* ---- engine (inference rank) ---- */
typedef struct weightd_engine weightd_engine;

typedef struct weightd_engine_options {
  const char* address;
  const char* model;
  const char* engine; /* instance name; ranks of one engine share it, a restarted engine keeps it */
  int32_t tp_rank, tp_size, pp_rank, pp_size, ep_rank, ep_size, dp_rank;
  const char* architecture; /* Hugging Face architecture */
  const char* profile;      /* e.g. "vllm-0.32" */
  const char* config_json;  /* Hugging Face config */
  const char* commit_mode;  /* NULL or "in_place" */
  int32_t auto_quiesce; /* nonzero: nobody reads the parameters during a sync, answer Prepare and
                           Commit at once */
  int32_t connect_timeout_ms; /* 0 = 10,000; < 0: do not wait, keep trying in the background */
  const char* device;         /* that holds the rank's memory; these as weightd_actor_options */
  int32_t worker;
  const char* worker_binary;
} weightd_engine_options;

/* One parameter of this rank. kind: 1 raw; 2 derived: lent in its loadable layout, converted before
 * Commit is answered; 3 opaque: listed only. alias_of: NULL, or the parameter whose storage it
 * shares.
 *
 * stage: 0, or for derived and pulled ones the stage of a sync in which it is received. The stages
 * of a rank are numbered from 1 without gaps, in order; parameters of different stages may share
 * the same memory. With several the daemon asks for the conversion of each before the next one is
 * written: see weightd_engine_converted.
 *
 * pulled: nonzero if no worker can map the parameter's own memory. It is received in `memory`, in
 * `stage` (not 0); to convert that stage the caller copies from there and compares. With stage_rows
 * so many rows (of the outermost dimension) come in `stage`, the next later, all in `memory`.
 *
 * With at most one stage the memory must stay as it was transferred, since peers catch up from it.
 * A rank with several can neither be a source of a catch-up nor be caught up: it waits for the next
 * sync. */
typedef struct weightd_param {
  const char* name;
  weightd_dtype dtype;
  int32_t num_dims;
  int64_t shape[WEIGHTD_MAX_DIMS]; /* local */
  int32_t kind;
  uint32_t stage;
  int32_t pulled;
  uint64_t stage_rows;
  const char* alias_of;
  weightd_memory memory; /* fd must be >= 0 or the space CUDA, unless opaque or aliased */
} weightd_param;

/* As weightd_actor_open. With connect_timeout_ms < 0 it does not block and fails only for bad
 * options. */
WEIGHTD_API weightd_error* weightd_engine_open(const weightd_engine_options* options,
                                               weightd_engine** engine);

/* Registers all parameters and lends their memory; replaces an earlier registration. Blocks until
 * daemon and worker have taken them, unless connect_timeout_ms < 0, in which case it goes on in
 * the background and weightd_engine_state tells.
 * \error NOT_FOUND UNKNOWN_ARCHITECTURE / UNKNOWN_PROFILE if no rule file describes the model;
 *   INVALID_ARGUMENT (and UNKNOWN_DEVICE) and WORKER_START as weightd_actor_register
 * \error INVALID_ARGUMENT CONFIG naming the parameter if stages have a gap, belong to one that is
 *   neither derived nor pulled, lack for one that is, or come with auto_quiesce
 * \error INVALID_ARGUMENT OVERLAP naming the parameter if memory of a stage overlaps that of
 * another parameter which is not of another stage */
WEIGHTD_API weightd_error* weightd_engine_register(weightd_engine* engine,
                                                   const weightd_param* params, size_t num_params);

/* A source tensor as the engine's own loader was fed it. */
typedef struct weightd_traced_source {
  const char* name;
  int32_t num_dims;
  int64_t shape[WEIGHTD_MAX_DIMS];
} weightd_traced_source;

/* A block of one parameter and the block of a source that the loader puts there. Parameter
 * dimension j follows source dimension source_dim[j], or none (-1, then its extent is 1); source
 * dimensions that none follows have extent 1. */
typedef struct weightd_traced_write {
  uint32_t param; /* position in the registered parameters */
  int32_t source; /* position in the traced sources; -1: zeros, without source fields */
  int64_t target_origin[WEIGHTD_MAX_DIMS];
  int64_t extent[WEIGHTD_MAX_DIMS];
  int64_t source_origin[WEIGHTD_MAX_DIMS];
  int8_t source_dim[WEIGHTD_MAX_DIMS];
} weightd_traced_write;

/* What a rank saw its engine's own loader do, for a model that no rule file describes. A source
 * that no write reads is one that the loader leaves out. */
typedef struct weightd_trace {
  const weightd_traced_source* sources;
  size_t num_sources;
  const weightd_traced_write* writes;
  size_t num_writes;
  int32_t preferred; /* nonzero: use it although a rule file describes the model */
} weightd_trace;

/* As weightd_engine_register, with the rank's trace, which is copied. A rule file that describes
 * (architecture, profile) wins unless the trace is preferred; without one the trace is the layout,
 * and the daemon proves at the first sync that it covers every parameter exactly once. All ranks of
 * an engine are traced, or none. trace may be NULL.
 * \error as weightd_engine_register; INVALID_ARGUMENT PROTOCOL / SHAPE / DUPLICATE_TENSOR for a
 *   trace that does not fit itself or the parameters */
WEIGHTD_API weightd_error* weightd_engine_register_traced(weightd_engine* engine,
                                                          const weightd_param* params,
                                                          size_t num_params,
                                                          const weightd_trace* trace);

/* State as JSON:
 * {"connected","registered","state","version","dirty","attempt","pending","stage","offered","idle",
 * "worker","error"}.
 * `state` is the name of weightd.v1.EngineState without prefix: POISONED means that a failed sync
 * may have torn the parameters. (version, attempt, dirty) is what is true about this rank's memory;
 * it is reported again to a restarted daemon, but only when no worker maps the memory any more.
 * `pending` is "", "prepare", "convert" or "commit": what the daemon waits for; `stage` the stage
 * to convert, 0 without a pending conversion; `offered` the version that the running attempt
 * brings, 0 outside of one. `idle` is {"count","version","error"}: how often the daemon has said
 * that no attempt is coming, and its last such word: a sync of `version` ended without this rank
 * for the reason `error`, or (0) it was registered and has nothing to catch up with. `error` is
 * null or an object as in a sync's result: why the session is down, else why the last attempt
 * failed. Never blocks. Caller frees. */
WEIGHTD_API char* weightd_engine_state(weightd_engine* engine);

/* Waits until the state JSON would differ from what it was `since` (a counter; 0 at first). Returns
 * the new counter; equal to `since` on timeout. */
WEIGHTD_API uint64_t weightd_engine_wait(weightd_engine* engine, uint64_t since, int timeout_ms);

/* Without auto_quiesce: answers the pending Prepare. error_message not NULL: the engine cannot be
 * quiesced; the attempt leaves this replica untouched.
 * \error FAILED_PRECONDITION if no Prepare is pending (any more) */
WEIGHTD_API weightd_error* weightd_engine_quiesced(weightd_engine* engine,
                                                   const char* error_message);

/* Answers the pending conversion: what was received of the stage that weightd_engine_state shows is
 * not needed any more, and its memory may be written again. Comes for every stage of the rank but
 * the last, which is converted before Commit is answered. error_message not NULL: the engine could
 * not convert it; the replica is then POISONED.
 * \error FAILED_PRECONDITION if no conversion is pending (any more) */
WEIGHTD_API weightd_error* weightd_engine_converted(weightd_engine* engine,
                                                    const char* error_message);

/* Without auto_quiesce: answers the pending Commit after derived parameters were converted.
 * caches_reset: comma-separated names of caches that were really reset, may be NULL. error_message
 * not NULL: the engine could not take the weights.
 * \error FAILED_PRECONDITION if no Commit is pending (any more) */
WEIGHTD_API weightd_error* weightd_engine_committed(weightd_engine* engine,
                                                    const char* caches_reset,
                                                    const char* error_message);

/* As weightd_actor_close; the daemon is told that the engine leaves in order. */
WEIGHTD_API void weightd_engine_close(weightd_engine* engine);

/* NOLINTEND(readability-identifier-naming) */

#ifdef __cplusplus
}
#endif

#endif /* WEIGHTD_WEIGHTD_H_ */
