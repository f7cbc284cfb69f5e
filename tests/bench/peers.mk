# Other stores, for this directory and for tests/rot/compare: each takes part
# where its header is there. Wants PEERS, their names; gives FOUND, the ones
# that are installed, DEFINES (-DHAVE_LMDB) and PEER_LIBS.

header.absl       := absl/container/btree_map.h
header.leveldb    := leveldb/c.h
header.lmdb       := lmdb.h
header.rocksdb    := rocksdb/c.h
header.sqlite     := sqlite3.h
header.wiredtiger := wiredtiger.h

libs.absl         := -labsl_throw_delegate -labsl_raw_logging_internal
libs.leveldb      := -lleveldb
libs.lmdb         := -llmdb
libs.rocksdb      := -lrocksdb
libs.sqlite       := -lsqlite3
libs.wiredtiger   := -lwiredtiger

compiler.absl      = $(CXX) -x c++

has = $(shell printf '\043include <%s>\n' '$(header.$(1))' | \
    $(or $(compiler.$(1)),$(CC)) -E - >/dev/null 2>&1 && echo $(1))

FOUND     := $(foreach peer,$(PEERS),$(call has,$(peer)))
DEFINES   := $(shell echo $(FOUND:%=-DHAVE_%) | tr '[:lower:]' '[:upper:]')
PEER_LIBS := $(foreach peer,$(FOUND),$(libs.$(peer)))

# Which there are is compiled in: what depends on this is made anew when they
# change.
$(OUT)/peers: FORCE
	@mkdir -p $(OUT)
	@echo '$(DEFINES)' | cmp -s - $@ || echo '$(DEFINES)' > $@
.PHONY: FORCE
FORCE:
