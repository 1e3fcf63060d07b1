/* A driver that plays GPUs, behind the entry points that pynvml calls.
 *
 * State lives in a file that all processes map (FAKE_NVML_STATE), so that a lock set by one process is seen
 * by another and outlives both, as with a real driver. Time is CLOCK_MONOTONIC, simulated in steps of 5 ms.
 *
 * Operating point of a busy device at SM clock f (MHz), V = max(v_floor, f / v_ridge_mhz), seconds and watts:
 *   t(f) = t_host + max(t_mem, t_comp * f0 / f)              one iteration of the workload
 *   P(f) = static_w + clk_w * (f / f0) * V^2 + (op_j * V^2 + mem_j) / t(f)
 * A cap lowers f until P(f) fits (event reason 0x4); above temperature_limit_c f is halved (0x40); a request
 * above clamp_mhz is accepted and has no effect above it. Energy and iterations are the exact integrals.
 * The sensors show them as hardware does: instant power is the mean of the last 25 ms and average power that
 * of the last 1 s, both renewed every update_ms, and so is the energy counter.
 *
 * A setting "type:NUMBER" makes that field answer with another nvmlValueType_t, "value:NUMBER" with another
 * value (NaN too).
 *
 * Calls that change the device are appended, with their result, to FAKE_NVML_STATE.log.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, DENIED = 4, NOT_FOUND = 6, TOO_SMALL = 7, NO_LIBRARY = 12, LOST = 15 };
enum { DEVICES = 8, SETTINGS = 64, FAULTS = 32, PROCESSES = 8, HISTORY = 512, CLOCK_STEP = 15 };
static const int64_t STEP_NS = 5000000;

typedef struct { char name[56]; double value; } setting_t;
typedef struct { char name[64]; int code; } fault_t;

typedef struct {
  char uuid[96], bus_id[32], name[96];
  setting_t settings[SETTINGS];
  fault_t faults[FAULTS];
  uint32_t processes[PROCESSES];
  unsigned lock_min, lock_max;
  int64_t last_ns, ticked_ns;
  double energy_j, iterations, temperature_c, cap_ns, thermal_ns;
  double history_w[HISTORY];
  int64_t steps;
  unsigned instant_mw, average_mw;
  unsigned long long counter_mj;
} device_t;

typedef struct { int devices; device_t device[DEVICES]; } state_t;

static state_t *state;
static int state_fd = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static double get(const device_t *d, const char *name) {
  for (int i = 0; i < SETTINGS && d->settings[i].name[0]; i++)
    if (!strcmp(d->settings[i].name, name)) return d->settings[i].value;
  return 0;
}

static void put(device_t *d, const char *name, double value) {
  for (int i = 0; i < SETTINGS; i++)
    if (!d->settings[i].name[0] || !strcmp(d->settings[i].name, name)) {
      snprintf(d->settings[i].name, sizeof d->settings[i].name, "%s", name);
      d->settings[i].value = value;
      return;
    }
  abort();
}

static const struct { const char *name; double value; } DEFAULTS[] = {
    {"max_mhz", 1980}, {"min_mhz", 210}, {"clamp_mhz", 1830}, {"idle_mhz", 345}, {"memory_mhz", 2619},
    {"f0_mhz", 1830}, {"v_floor", 0.6}, {"v_ridge_mhz", 1830}, {"idle_w", 75}, {"static_w", 90},
    {"clk_w", 110}, {"op_j", 0.2}, {"mem_j", 1.5}, {"t_host_s", 0.0005}, {"t_mem_s", 0.01},
    {"t_comp_s", 0.004}, {"limit_w", 700}, {"min_limit_w", 200}, {"max_limit_w", 700},
    {"default_limit_w", 700}, {"ambient_c", 30}, {"c_per_w", 0.06}, {"tau_s", 5},
    {"temperature_limit_c", 90}, {"update_ms", 100}, {"privileged", 1},
};

static int open_state(void) {
  if (state) return 1;
  const char *path = getenv("FAKE_NVML_STATE");
  if (!path || (state_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) < 0) return 0;
  flock(state_fd, LOCK_EX);
  int fresh = lseek(state_fd, 0, SEEK_END) < (off_t)sizeof(state_t);
  if (fresh && ftruncate(state_fd, sizeof(state_t))) return 0;
  state = mmap(NULL, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, state_fd, 0);
  if (state == MAP_FAILED) { state = NULL; return 0; }
  if (fresh) {
    state->devices = 1;
    for (int i = 0; i < DEVICES; i++) {
      device_t *d = &state->device[i];
      snprintf(d->uuid, sizeof d->uuid, "GPU-fa4e0000-0000-4000-8000-%012d", i);
      snprintf(d->bus_id, sizeof d->bus_id, "00000000:%02X:00.0", 16 + i);
      snprintf(d->name, sizeof d->name, "Fake GPU");
      for (size_t k = 0; k < sizeof DEFAULTS / sizeof *DEFAULTS; k++) put(d, DEFAULTS[k].name, DEFAULTS[k].value);
      d->temperature_c = get(d, "ambient_c") + get(d, "c_per_w") * get(d, "idle_w");
      d->last_ns = d->ticked_ns = now_ns();
      for (int k = 0; k < HISTORY; k++) d->history_w[k] = get(d, "idle_w");
      d->instant_mw = d->average_mw = (unsigned)(1000 * get(d, "idle_w"));
      d->counter_mj = 1000000;
      d->energy_j = 1000;
    }
  }
  flock(state_fd, LOCK_UN);
  return 1;
}

static double iteration_s(const device_t *d, double mhz) {
  return get(d, "t_host_s") + fmax(get(d, "t_mem_s"), get(d, "t_comp_s") * get(d, "f0_mhz") / mhz);
}

static double power_w(const device_t *d, double mhz) {
  double v = fmax(get(d, "v_floor"), mhz / get(d, "v_ridge_mhz"));
  return get(d, "static_w") + get(d, "clk_w") * mhz / get(d, "f0_mhz") * v * v +
         (get(d, "op_j") * v * v + get(d, "mem_j")) / iteration_s(d, mhz);
}

/* Clock, power and event reasons as they are now. */
static void operate(const device_t *d, double *mhz, double *watts, unsigned long long *reasons) {
  *reasons = 0;
  if (!get(d, "busy")) {
    *mhz = fmax(get(d, "idle_mhz"), d->lock_min);
    *watts = get(d, "idle_w");
    *reasons = 0x1;
    return;
  }
  double wanted = d->lock_max ? d->lock_max : get(d, "max_mhz");
  wanted = fmin(wanted, get(d, "clamp_mhz"));
  if (d->temperature_c > get(d, "temperature_limit_c")) { wanted = CLOCK_STEP * floor(wanted / 2 / CLOCK_STEP); *reasons |= 0x40; }
  while (wanted > get(d, "min_mhz") && power_w(d, wanted) > get(d, "limit_w")) { wanted -= CLOCK_STEP; *reasons |= 0x4; }
  *mhz = wanted;
  *watts = power_w(d, wanted);
}

static double mean_w(const device_t *d, int steps) {
  double sum = 0;
  for (int k = 1; k <= steps; k++) sum += d->history_w[(d->steps - k + 64 * HISTORY) % HISTORY];
  return sum / steps;
}

static void advance(device_t *d) {
  int64_t now = now_ns(), tick_ns = (int64_t)(get(d, "update_ms") * 1e6);
  double dt = STEP_NS * 1e-9;
  while (d->last_ns + STEP_NS <= now) {
    double mhz, watts;
    unsigned long long reasons;
    operate(d, &mhz, &watts, &reasons);
    d->last_ns += STEP_NS;
    d->energy_j += watts * dt;
    if (get(d, "busy")) d->iterations += dt / iteration_s(d, mhz);
    if (reasons & 0x4) d->cap_ns += STEP_NS;
    if (reasons & 0x40) d->thermal_ns += STEP_NS;
    double target = get(d, "ambient_c") + get(d, "c_per_w") * watts;
    d->temperature_c += (target - d->temperature_c) * (1 - exp(-dt / get(d, "tau_s")));
    d->history_w[d->steps++ % HISTORY] = watts;
    if (d->last_ns - d->ticked_ns >= tick_ns) {
      d->ticked_ns = d->last_ns;
      d->instant_mw = (unsigned)(1000 * mean_w(d, 5));
      d->average_mw = (unsigned)(1000 * mean_w(d, 200));
      if (!get(d, "counter_stuck")) d->counter_mj = (unsigned long long)(d->energy_j * 1000);
    }
  }
}

static int enter(void) {
  if (!open_state()) return 0;
  pthread_mutex_lock(&mutex);
  flock(state_fd, LOCK_EX);
  return 1;
}

static void leave(void) {
  flock(state_fd, LOCK_UN);
  pthread_mutex_unlock(&mutex);
}

static int fault(const device_t *d, const char *name) {
  if (get(d, "lost")) return LOST;
  for (int i = 0; i < FAULTS && d->faults[i].name[0]; i++)
    if (!strcmp(d->faults[i].name, name)) return d->faults[i].code;
  return OK;
}

/* Locks the state and gives the device, up to date; NULL and a code when the call is to fail. */
static device_t *begin(void *handle, const char *function, int *code) {
  if (!enter()) { *code = NO_LIBRARY; return NULL; }
  intptr_t index = (intptr_t)handle - 1;
  if (index < 0 || index >= state->devices) { *code = INVALID; leave(); return NULL; }
  device_t *d = &state->device[index];
  useconds_t slow = (useconds_t)get(d, "call_us");
  if (slow) usleep(slow);
  *code = fault(d, function);
  if (*code) { leave(); return NULL; }
  advance(d);
  return d;
}

#define DEVICE(handle) int code; device_t *d = begin(handle, __func__, &code); if (!d) return code
#define END(result) do { leave(); return result; } while (0)

static int logged(const char *what, const device_t *d, unsigned a, unsigned b, int code) {
  char path[4096], line[256];
  snprintf(path, sizeof path, "%s.log", getenv("FAKE_NVML_STATE"));
  int n = snprintf(line, sizeof line, "%lld %d %s %s %u %u %d\n", (long long)now_ns(), getpid(), what, d->uuid, a, b, code);
  int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (fd >= 0) { if (write(fd, line, n) != n) abort(); close(fd); }
  return code;
}

/* For the tests. */
void fake_devices(int count) { if (enter()) { state->devices = count; leave(); } }
void fake_set(int index, const char *name, double value) {
  if (enter()) { advance(&state->device[index]); put(&state->device[index], name, value); leave(); }
}
double fake_get(int index, const char *name) {
  if (!enter()) return NAN;
  device_t *d = &state->device[index];
  advance(d);
  double mhz, watts, result;
  unsigned long long reasons;
  operate(d, &mhz, &watts, &reasons);
  result = !strcmp(name, "energy_j") ? d->energy_j : !strcmp(name, "iterations") ? d->iterations
         : !strcmp(name, "time_ns") ? (double)d->last_ns : !strcmp(name, "mhz") ? mhz
         : !strcmp(name, "watts") ? watts : !strcmp(name, "temperature_c") ? d->temperature_c
         : !strcmp(name, "lock_min") ? d->lock_min : !strcmp(name, "lock_max") ? d->lock_max
         : !strcmp(name, "iteration_s") ? iteration_s(d, mhz) : get(d, name);
  leave();
  return result;
}
void fake_name(int index, const char *uuid, const char *bus_id, const char *name) {
  if (!enter()) return;
  device_t *d = &state->device[index];
  snprintf(d->uuid, sizeof d->uuid, "%s", uuid);
  snprintf(d->bus_id, sizeof d->bus_id, "%s", bus_id);
  snprintf(d->name, sizeof d->name, "%s", name);
  leave();
}
/* A function of this file, or "field:NUMBER"; code 0 takes the fault back. */
void fake_fault(int index, const char *name, int code) {
  if (!enter()) return;
  for (int i = 0; i < FAULTS; i++) {
    fault_t *f = &state->device[index].faults[i];
    if (f->name[0] && strcmp(f->name, name)) continue;
    snprintf(f->name, sizeof f->name, "%s", name);
    f->code = code;
    break;
  }
  leave();
}
void fake_processes(int index, const uint32_t *pids, int count) {
  if (!enter()) return;
  memset(state->device[index].processes, 0, sizeof state->device[index].processes);
  memcpy(state->device[index].processes, pids, sizeof *pids * count);
  leave();
}

/* NVML. */
int nvmlInitWithFlags(unsigned flags) { (void)flags; return open_state() ? OK : NO_LIBRARY; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
  switch (code) {
    case OK: return "Success";
    case INVALID: return "Invalid Argument";
    case UNSUPPORTED: return "Not Supported";
    case DENIED: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case TOO_SMALL: return "Insufficient Size";
    case NO_LIBRARY: return "NVML Shared Library Not Found";
    case 13: return "Function Not Found";
    case LOST: return "GPU is lost";
    default: return "Unknown Error";
  }
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "999.01-fake"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { if (!enter()) return NO_LIBRARY; *count = state->devices; END(OK); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  if (!enter()) return NO_LIBRARY;
  *handle = (void *)(intptr_t)(index + 1);
  int known = (int)index < state->devices;
  END(known ? fault(&state->device[index], __func__) : INVALID);
}
static int find(const char *wanted, int by_uuid, void **handle) {
  if (!enter()) return NO_LIBRARY;
  for (int i = 0; i < state->devices; i++) {
    device_t *d = &state->device[i];
    if (!strcasecmp(by_uuid ? d->uuid : d->bus_id, wanted)) { *handle = (void *)(intptr_t)(i + 1); END(fault(d, "find")); }
  }
  END(NOT_FOUND);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) { return find(uuid, 1, handle); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **handle) { return find(bus_id, 0, handle); }
int nvmlDeviceGetUUID(void *h, char *text, unsigned size) { DEVICE(h); snprintf(text, size, "%s", d->uuid); END(OK); }
int nvmlDeviceGetName(void *h, char *text, unsigned size) { DEVICE(h); snprintf(text, size, "%s", d->name); END(OK); }
int nvmlDeviceGetIndex(void *h, unsigned *index) { DEVICE(h); *index = (unsigned)((intptr_t)h - 1); END(OK); }

typedef struct { char legacy[16]; unsigned domain, bus, device, id, sub_id; char bus_id[32]; } pci_t;
int nvmlDeviceGetPciInfo_v3(void *h, pci_t *pci) {
  DEVICE(h);
  memset(pci, 0, sizeof *pci);
  snprintf(pci->bus_id, sizeof pci->bus_id, "%s", d->bus_id);
  END(OK);
}

static double clock_mhz(const device_t *d, int type) {
  double mhz, watts;
  unsigned long long reasons;
  operate(d, &mhz, &watts, &reasons);
  return type == 2 ? get(d, "memory_mhz") : mhz;
}
int nvmlDeviceGetClockInfo(void *h, int type, unsigned *mhz) { DEVICE(h); *mhz = (unsigned)clock_mhz(d, type); END(OK); }
int nvmlDeviceGetMaxClockInfo(void *h, int type, unsigned *mhz) {
  DEVICE(h); *mhz = (unsigned)get(d, type == 2 ? "memory_mhz" : "max_mhz"); END(OK);
}
int nvmlDeviceGetSupportedMemoryClocks(void *h, unsigned *count, unsigned *mhz) {
  DEVICE(h);
  int enough = mhz && *count >= 1;
  *count = 1;
  if (enough) mhz[0] = (unsigned)get(d, "memory_mhz");
  END(enough ? OK : TOO_SMALL);
}
int nvmlDeviceGetSupportedGraphicsClocks(void *h, unsigned memory, unsigned *count, unsigned *mhz) {
  DEVICE(h);
  if (memory != (unsigned)get(d, "memory_mhz")) END(NOT_FOUND);
  unsigned top = (unsigned)get(d, "max_mhz"), n = (top - (unsigned)get(d, "min_mhz")) / CLOCK_STEP + 1;
  int enough = mhz && *count >= n;
  *count = n;
  if (enough) for (unsigned i = 0; i < n; i++) mhz[i] = top - i * CLOCK_STEP;
  END(enough ? OK : TOO_SMALL);
}
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *c) {
  DEVICE(h); if (sensor) END(UNSUPPORTED); *c = (unsigned)d->temperature_c; END(OK);
}
typedef struct { unsigned version; int sensor, c; } temperature_t;
int nvmlDeviceGetTemperatureV(void *h, temperature_t *t) { DEVICE(h); t->c = (int)d->temperature_c; END(OK); }
int nvmlDeviceGetCurrentClocksEventReasons(void *h, unsigned long long *reasons) {
  DEVICE(h);
  double mhz, watts;
  operate(d, &mhz, &watts, reasons);
  END(OK);
}
int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) { DEVICE(h); *mw = d->average_mw; END(OK); }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) { DEVICE(h); *mj = d->counter_mj; END(OK); }
int nvmlDeviceGetEnforcedPowerLimit(void *h, unsigned *mw) { DEVICE(h); *mw = (unsigned)(1000 * get(d, "limit_w")); END(OK); }
int nvmlDeviceGetPowerManagementLimit(void *h, unsigned *mw) { DEVICE(h); *mw = (unsigned)(1000 * get(d, "limit_w")); END(OK); }
int nvmlDeviceGetPowerManagementDefaultLimit(void *h, unsigned *mw) { DEVICE(h); *mw = (unsigned)(1000 * get(d, "default_limit_w")); END(OK); }
int nvmlDeviceGetPowerManagementLimitConstraints(void *h, unsigned *least, unsigned *most) {
  DEVICE(h);
  *least = (unsigned)(1000 * get(d, "min_limit_w"));
  *most = (unsigned)(1000 * get(d, "max_limit_w"));
  END(OK);
}
int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
  DEVICE(h); *current = *pending = (unsigned)get(d, "mig"); END(OK);
}
typedef struct { unsigned utilisation[2]; } utilisation_t;
int nvmlDeviceGetUtilizationRates(void *h, utilisation_t *u) {
  DEVICE(h); u->utilisation[0] = get(d, "busy") ? 100 : 0; u->utilisation[1] = 0; END(OK);
}
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, process_t *out) {
  DEVICE(h);
  unsigned n = 0;
  while (n < PROCESSES && d->processes[n]) n++;
  int enough = n == 0 || (out && *count >= n);
  for (unsigned i = 0; enough && i < n; i++) out[i] = (process_t){d->processes[i], 1 << 20, ~0u, ~0u};
  *count = n;
  END(enough ? OK : TOO_SMALL);
}

typedef union { double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; int si; unsigned short us; } value_t;
typedef struct { uint32_t id, scope; int64_t timestamp, latency; int type, code; value_t value; } field_t;
static int field_value(const device_t *d, unsigned id, value_t *v, int *type) {
  double limit = 1000 * get(d, "limit_w");
  *type = 1; /* unsigned int */
  switch (id) {
    case 185: v->ui = d->average_mw; return OK;
    case 186: v->ui = d->instant_mw; return OK;
    case 187: v->ui = (unsigned)(1000 * get(d, "min_limit_w")); return OK;
    case 188: v->ui = (unsigned)(1000 * get(d, "max_limit_w")); return OK;
    case 189: v->ui = (unsigned)(1000 * get(d, "default_limit_w")); return OK;
    case 190: case 192: v->ui = (unsigned)limit; return OK;
    case 82: v->ui = (unsigned)d->temperature_c + 8; return OK;
    case 83: *type = 3; v->ull = d->counter_mj; return OK; /* unsigned long long */
    case 74: *type = 3; v->ull = (unsigned long long)d->cap_ns; return OK;
    case 270: *type = 3; v->ull = (unsigned long long)d->thermal_ns; return OK;
    case 76: case 269: case 271: *type = 3; v->ull = 0; return OK;
    default: return UNSUPPORTED;
  }
}
static int has(const device_t *d, const char *name) {
  for (int i = 0; i < SETTINGS && d->settings[i].name[0]; i++)
    if (!strcmp(d->settings[i].name, name)) return 1;
  return 0;
}
/* The same number as another type, or another number. */
static void disguise(const device_t *d, field_t *f) {
  char type[32], value[32];
  snprintf(type, sizeof type, "type:%u", f->id);
  snprintf(value, sizeof value, "value:%u", f->id);
  if (!has(d, type) && !has(d, value)) return;
  double x = has(d, value) ? get(d, value) : f->type == 3 ? (double)f->value.ull : f->value.ui;
  if (has(d, type)) f->type = (int)get(d, type);
  memset(&f->value, 0xA5, sizeof f->value); /* what a type does not cover is rubbish */
  switch (f->type) {
    case 0: f->value.d = x; break;
    case 1: f->value.ui = (unsigned)x; break;
    case 2: f->value.ul = (unsigned long)x; break;
    case 3: f->value.ull = x < 18446744073709549568.0 ? (unsigned long long)x : ~0ull; break;
    case 4: f->value.sll = (long long)x; break;
    case 5: f->value.si = (int)x; break;
    case 6: f->value.us = (unsigned short)x; break;
  }
}
int nvmlDeviceGetFieldValues(void *h, int count, field_t *fields) {
  DEVICE(h);
  for (int i = 0; i < count; i++) {
    char name[32];
    snprintf(name, sizeof name, "field:%u", fields[i].id);
    fields[i].value.ull = 0;
    fields[i].timestamp = d->ticked_ns / 1000;
    int faulty = fault(d, name);
    fields[i].code = faulty ? faulty : field_value(d, fields[i].id, &fields[i].value, &fields[i].type);
    if (!fields[i].code) disguise(d, &fields[i]);
  }
  END(OK);
}

/* What changes the device. */
int nvmlDeviceSetGpuLockedClocks(void *h, unsigned least, unsigned most) {
  DEVICE(h);
  int bad = !get(d, "privileged") ? DENIED : least > most || most > get(d, "max_mhz") || least < get(d, "min_mhz") ? INVALID : OK;
  if (!bad) { d->lock_min = least; d->lock_max = most; }
  END(logged("lock", d, least, most, bad));
}
int nvmlDeviceResetGpuLockedClocks(void *h) {
  DEVICE(h);
  int bad = get(d, "privileged") ? OK : DENIED;
  if (!bad) d->lock_min = d->lock_max = 0;
  END(logged("unlock", d, 0, 0, bad));
}
int nvmlDeviceSetPowerManagementLimit(void *h, unsigned mw) {
  DEVICE(h);
  int bad = !get(d, "privileged") ? DENIED : mw < 1000 * get(d, "min_limit_w") || mw > 1000 * get(d, "max_limit_w") ? INVALID : OK;
  if (!bad) put(d, "limit_w", mw / 1000.0);
  END(logged("limit", d, mw, 0, bad));
}
