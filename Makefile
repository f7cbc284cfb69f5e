# kvmeta: GNU make, no configure step.
#
#   make                 build/libkvmeta.a and build/libkvmeta.so
#   make deps demo       install what is missing; kvmeta at work on DIR=/usr
#   make deps check      install what is missing; build and run the tests
#   make help            everything else
#
# Honours CC, CFLAGS, CPPFLAGS, LDFLAGS, PREFIX, DESTDIR. Results of one
# compiler and set of flags go to BUILD; use another one for another set.

VERSION := $(shell sed -n \
    's/.*KVMETA_VERSION_STRING "\(.*\)"/\1/p' kvmeta.h)
SOVERSION := $(firstword $(subst ., ,$(VERSION)))

CFLAGS  ?= -O2 -g
PREFIX  ?= /usr/local
BUILD   ?= build
DIR     ?= /usr
SCALE   ?= 1

WARN_TEST := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes \
    -Wmissing-prototypes -Wcast-qual -Wundef -Wvla -Wwrite-strings
WARN := $(WARN_TEST) -Wconversion -Wsign-conversion

# Asked for when a recipe runs, not when this file is read: `make deps check`
# installs first.
pc = $(shell pkg-config --$(2) $(1) 2>/dev/null || echo $(3))
ZSTD_CFLAGS   = $(call pc,libzstd,cflags)
ZSTD_LIBS     = $(call pc,libzstd,libs,-lzstd)
CMOCKA_CFLAGS = $(call pc,cmocka,cflags)
CMOCKA_LIBS   = $(call pc,cmocka,libs,-lcmocka)
LIBS          = $(ZSTD_LIBS) -lpthread

# Short lines, unless V=1 asks for the commands.
Q   := $(if $(V),,@)
say = @$(if $(V),:,printf '  %-8s %s\n' $(1) $(2))

# INSTRUMENT is set by asan, ubsan, tsan and coverage below, for compiling and
# for linking.
COMPILE = $(CC) -std=c11 -I. $(CPPFLAGS) $(CFLAGS) $(INSTRUMENT) \
    -pthread -MMD -MP
LINK = $(CC) $(CFLAGS) $(LDFLAGS) $(INSTRUMENT) -pthread

ifeq ($(shell uname -s),Darwin)
  SO       := libkvmeta.dylib
  SO_MAJOR := libkvmeta.$(SOVERSION).dylib
  SO_FLAGS  = -dynamiclib -install_name $(PREFIX)/lib/$(SO_MAJOR)
else
  SO       := libkvmeta.so
  SO_MAJOR := libkvmeta.so.$(SOVERSION)
  SO_FLAGS  = -shared -Wl,-soname,$(SO_MAJOR)
endif

# ---------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------

LIB := $(BUILD)/libkvmeta.a

.PHONY: all
all: $(LIB) $(BUILD)/$(SO)

$(BUILD)/kvmeta.o: kvmeta.c
	@mkdir -p $(@D)
	$(call say,compile,$@)
	$(Q)$(COMPILE) $(WARN) -fvisibility=hidden $(ZSTD_CFLAGS) -c $< -o $@

$(BUILD)/kvmeta.pic.o: kvmeta.c
	@mkdir -p $(@D)
	$(call say,compile,$@)
	$(Q)$(COMPILE) $(WARN) -fvisibility=hidden -fPIC $(ZSTD_CFLAGS) -c $< -o $@

$(LIB): $(BUILD)/kvmeta.o
	$(call say,archive,$@)
	@rm -f $@
	$(Q)$(AR) rcs $@ $^

$(BUILD)/$(SO): $(BUILD)/kvmeta.pic.o
	$(call say,link,$@)
	$(Q)$(LINK) $(SO_FLAGS) $^ $(LIBS) -o $(BUILD)/$(SO_MAJOR)
	$(Q)ln -sf $(SO_MAJOR) $@

$(BUILD)/kvmeta.pc: kvmeta.h Makefile
	@mkdir -p $(@D)
	@printf '%s\n' 'prefix=$(PREFIX)' 'libdir=$${prefix}/lib' \
	    'includedir=$${prefix}/include' '' 'Name: kvmeta' \
	    'Description: Embedded store of fixed-width metadata records' \
	    'Version: $(VERSION)' 'Requires.private: libzstd' \
	    'Libs: -L$${libdir} -lkvmeta' 'Libs.private: -lpthread' \
	    'Cflags: -I$${includedir}' > $@

.PHONY: install uninstall
install: all $(BUILD)/kvmeta.pc
	install -d '$(DESTDIR)$(PREFIX)/include' \
	    '$(DESTDIR)$(PREFIX)/lib/pkgconfig'
	install -m 644 kvmeta.h '$(DESTDIR)$(PREFIX)/include/'
	install -m 644 $(LIB) '$(DESTDIR)$(PREFIX)/lib/'
	install -m 755 $(BUILD)/$(SO_MAJOR) '$(DESTDIR)$(PREFIX)/lib/'
	ln -sf $(SO_MAJOR) '$(DESTDIR)$(PREFIX)/lib/$(SO)'
	install -m 644 $(BUILD)/kvmeta.pc '$(DESTDIR)$(PREFIX)/lib/pkgconfig/'

uninstall:
	rm -f '$(DESTDIR)$(PREFIX)/include/kvmeta.h'
	rm -f '$(DESTDIR)$(PREFIX)/lib/'libkvmeta.*
	rm -f '$(DESTDIR)$(PREFIX)/lib/pkgconfig/kvmeta.pc'

# ---------------------------------------------------------------------------
# Examples and the demo
# ---------------------------------------------------------------------------

EXAMPLES := $(patsubst examples/%.c,$(BUILD)/%,$(wildcard examples/*.c))

$(EXAMPLES): $(BUILD)/%: examples/%.c $(LIB)
	$(call say,compile,$@)
	$(Q)$(COMPILE) $(WARN) $< $(LIB) $(LDFLAGS) $(LIBS) -o $@

.PHONY: examples demo
examples: $(EXAMPLES)

demo: $(BUILD)/fsmeta
	@$(BUILD)/fsmeta --dir '$(DIR)'

# ---------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------

# Each tests/*/test_X.c is a program $(BUILD)/tests/test_X. One that includes
# kvmeta.c, to look inside, is not linked with the library a second time.
TEST_SRCS    := $(sort $(wildcard tests/*/test_*.c))
TEST_SCRIPTS := $(sort $(wildcard tests/*/test_*.sh))
SUPPORT_SRCS := $(filter-out $(TEST_SRCS), \
    $(wildcard tests/support/*.c tests/sim/*.c))
WHITE_SRCS   := $(if $(TEST_SRCS),$(shell \
    grep -lF '#include "../../kvmeta.c"' $(TEST_SRCS)))
SUPPORT_OBJS := $(SUPPORT_SRCS:%.c=$(BUILD)/%.o)
SUPPORT_LIB  := $(BUILD)/tests/libsupport.a
TESTS        := $(addprefix $(BUILD)/tests/, \
    $(basename $(notdir $(TEST_SRCS))))

# Some include kvmeta.c behind system headers, too late for it to ask for large
# files on 32 bits.
$(BUILD)/tests/%.o: tests/%.c
	@mkdir -p $(@D)
	$(call say,compile,$<)
	$(Q)$(COMPILE) -D_FILE_OFFSET_BITS=64 $(WARN_TEST) \
	    -Itests -Itests/support -Itests/sim \
	    $(ZSTD_CFLAGS) $(CMOCKA_CFLAGS) -c $< -o $@

$(SUPPORT_LIB): $(SUPPORT_OBJS)
	$(call say,archive,$@)
	@rm -f $@
	$(Q)$(AR) rcs $@ $^

# $(1): source, $(2): what to link it with beside its own object
define test_rule
$(BUILD)/tests/$(basename $(notdir $(1))): $(BUILD)/$(1:.c=.o) \
    $(SUPPORT_LIB) $(2)
	$$(call say,link,$$@)
	$$(Q)$$(LINK) $$^ $$(CMOCKA_LIBS) $$(LIBS) -lm -o $$@
endef
# What tests/real/test_strace.sh runs.
REAL_WORKER := $(BUILD)/tests/real_worker
$(REAL_WORKER): $(BUILD)/tests/real/worker.o $(SUPPORT_LIB) $(LIB)
	$(call say,link,$@)
	$(Q)$(LINK) $^ $(LIBS) -o $@

$(foreach s,$(WHITE_SRCS),$(eval $(call test_rule,$(s),)))
$(foreach s,$(filter-out $(WHITE_SRCS),$(TEST_SRCS)), \
    $(eval $(call test_rule,$(s),$(LIB))))

# The ones that run for long come first; the others fill the gaps.
LONG    := $(filter %_crash %_rot %_fault %_model %_kill %_threads %_sched,$(TESTS))
ORDERED := $(LONG) $(filter-out $(LONG),$(TESTS)) $(TEST_SCRIPTS)

.PHONY: deps tests check check-long
deps:
	@CC='$(CC)' tests/deps

tests: $(TESTS) $(REAL_WORKER)

# One program, or a few: make check T='test_tree test_log'
CHOSEN = $(if $(T),$(filter $(addprefix %/,$(T) $(T:=.sh)),$(ORDERED)), \
    $(ORDERED))

check: all $(filter $(TESTS),$(CHOSEN)) $(EXAMPLES) $(REAL_WORKER)
	@BUILD='$(BUILD)' CC='$(CC)' tests/run --scale $(SCALE) $(CHOSEN)

check-long:
	@$(MAKE) --no-print-directory check SCALE=20 LIMIT=36000

# The sanitizers: everything is built anew in a directory of its own. They
# slow the tests down 2 to 15 times, so the tests do their least: scale 0.
SANITIZED = $(MAKE) --no-print-directory BUILD=build-$@ CFLAGS='-O1 -g' \
    SCALE=$(SAN_SCALE) LIMIT=3600 T='$(T)' check-programs
SAN_SCALE ?= 0

.PHONY: asan ubsan tsan coverage check-programs
check-programs: $(filter $(TESTS),$(CHOSEN))
	@BUILD='$(BUILD)' tests/run --scale $(SCALE) $(filter-out %.sh,$(CHOSEN))

asan:
	@ASAN_OPTIONS=detect_leaks=1:abort_on_error=1 $(SANITIZED) \
	    INSTRUMENT='-fsanitize=address -fno-omit-frame-pointer'

ubsan:
	@UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED) \
	    INSTRUMENT='-fsanitize=undefined -fno-sanitize-recover=all'

tsan:
	@TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $(SANITIZED) \
	    INSTRUMENT='-fsanitize=thread -fno-omit-frame-pointer'

# Lines and branches of kvmeta.c, by clang's counts. A program that is killed
# or ends by _exit keeps them, too: %c maps the counters to the file. Without
# assertions: that they do not fail is the point of them.
COVER_FLAGS := -fprofile-instr-generate -fcoverage-mapping \
    -fprofile-update=atomic -mllvm -runtime-counter-relocation \
    -Wno-unused-command-line-argument
CLANG ?= clang

coverage: export LLVM_PROFILE_FILE = $(CURDIR)/build-$@/profiles/%m%c.profraw
coverage:
	@rm -rf build-$@
	@$(MAKE) --no-print-directory BUILD=build-$@ CC='$(CLANG)' \
	    CFLAGS='-O1 -g -DNDEBUG' INSTRUMENT='$(COVER_FLAGS)' \
	    SCALE=$(SAN_SCALE) LIMIT=3600 T='$(T)' check-programs
	@$(MAKE) -s --no-print-directory -C fuzz OUT=../build-$@/fuzz \
	    CC='$(CLANG)' CFLAGS='-O1 -g -DNDEBUG' \
	    REPLAY_FLAGS='$(COVER_FLAGS)' replay
	@CLANG='$(CLANG)' tests/lint/coverage build-$@

# ---------------------------------------------------------------------------
# Static checks, benchmarks, fuzzing
# ---------------------------------------------------------------------------

# Debian's cross compilers; tests/ports/run fetches the rest.
PORTS_DEBIAN := gcc-s390x-linux-gnu libc6-dev-s390x-cross \
    gcc-i686-linux-gnu libc6-dev-i386-cross qemu-user gcc clang

.PHONY: ports deps-ports
ports:
	@T='$(T)' tests/ports/run --scale $(PORTS_SCALE) $(PORTS)
PORTS_SCALE ?= 0

deps-ports:
	apt-get install -y --no-install-recommends $(PORTS_DEBIAN)

.PHONY: lint bench deps-bench bench-peers bench-check rot-compare fuzz \
    fuzz-all
lint: all $(EXAMPLES)
	@BUILD='$(BUILD)' CC='$(CC)' tests/lint/test_lint.sh --full

bench deps-bench bench-peers bench-check:
	@$(MAKE) --no-print-directory -C tests/bench $@

rot-compare:
	@$(MAKE) --no-print-directory -C tests/rot/compare $@

fuzz fuzz-all:
	@$(MAKE) --no-print-directory -C fuzz $@

# Faults put into kvmeta.c, to show that the tests notice.
COUNT ?= 100
SEED  ?= 1

.PHONY: mutants mutants-source
mutants:
	@CC='$(CC)' tests/mutants/protocol

mutants-source:
	@command -v python3 >/dev/null || \
	    { echo 'SKIPPED: no python3 here, no mutant was run'; exit 1; }
	@CC='$(CC)' tests/mutants/source --seed $(SEED) --count $(COUNT)

# ---------------------------------------------------------------------------
# The rest
# ---------------------------------------------------------------------------

.PHONY: clean help
clean:
	rm -rf build build-*

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile
	@printf '%s\n' \
	  'make examples        build/quickstart and build/fsmeta' \
	  'make demo DIR=/srv   the demo on another directory' \
	  'make check T=test_x  one test program' \
	  'make check SCALE=5   the same tests, five times as long' \
	  'make check-long      twenty times as long' \
	  'make asan            the tests under AddressSanitizer; ubsan, tsan' \
	  'make coverage        fails unless the tests reach each line and branch' \
	  'make ports           other processors and compilers: s390x, i386' \
	  'make lint            gcc, clang, analysers, sizes of functions' \
	  'make bench           benchmarks; bench-peers: beside other stores' \
	  'make rot-compare     the same damage to kvmeta and to other stores' \
	  'make fuzz T=ops SECONDS=60   one fuzzer; fuzz-all: each of them' \
  'make mutants         break each rule of the protocol: do tests notice?' \
  'make mutants-source COUNT=100   the same with small faults in the source' \
	  'make install         to PREFIX=$(PREFIX), below DESTDIR' \
	  'make clean'

# With -j, too, `make deps check` installs before it compiles.
ifneq ($(filter deps,$(MAKECMDGOALS)),)
$(BUILD)/kvmeta.o $(BUILD)/kvmeta.pic.o $(SUPPORT_OBJS) \
    $(TEST_SRCS:%.c=$(BUILD)/%.o) $(EXAMPLES): | deps
endif

-include $(wildcard $(BUILD)/*.d $(BUILD)/tests/*/*.d)
