# Installing: the shared and the static library, the headers, what pkg-config and CMake read, the
# command, its man page and its completions.
#
#     make install PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu DESTDIR=/tmp/stage

PREFIX ?= /usr/local
DESTDIR ?=
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
INSTALL ?= install

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
PKGCONFIGDIR := $(LIBDIR)/pkgconfig
CMAKEDIR := $(LIBDIR)/cmake/nblock

# All that is installed: `make uninstall` removes these.
INSTALLED := \
	$(BINDIR)/nblock \
	$(INCLUDEDIR)/nblock.h \
	$(INCLUDEDIR)/nblock.hpp \
	$(LIBDIR)/libnblock.so.$(VERSION) \
	$(LIBDIR)/libnblock.so.0 \
	$(LIBDIR)/libnblock.so \
	$(LIBDIR)/libnblock.a \
	$(PKGCONFIGDIR)/nblock.pc \
	$(CMAKEDIR)/nblock-config.cmake \
	$(CMAKEDIR)/nblock-config-version.cmake \
	$(TMPFILESDIR)/nblock.conf \
	$(DATADIR)/man/man1/nblock.1 \
	$(DATADIR)/bash-completion/completions/nblock \
	$(DATADIR)/zsh/site-functions/_nblock \
	$(DATADIR)/fish/vendor_completions.d/nblock.fish

FILL := sed -e 's|@VERSION@|$(VERSION)|g' -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@LIBDIR@|$(LIBDIR)|g' \
	-e 's|@INCLUDEDIR@|$(INCLUDEDIR)|g' \
	-e "s|@CMAKE_TO_LIBDIR@|$$(realpath -m --relative-to='$(CMAKEDIR)' '$(LIBDIR)')|g" \
	-e "s|@CMAKE_TO_INCLUDEDIR@|$$(realpath -m --relative-to='$(CMAKEDIR)' '$(INCLUDEDIR)')|g"

# The user who installs may differ from the one who builds, and have another PATH: without cargo, what was
# built before is installed.
.PHONY: install uninstall
install: $(if $(shell command -v $(CARGO)),build) ## installs under PREFIX (default /usr/local), below DESTDIR
	packaging/static-library.sh $(BUILD)/libnblock.a $(BUILD)/libnblock-install.a
	$(INSTALL) -d $(sort $(addprefix $(DESTDIR),$(dir $(INSTALLED))))
	$(INSTALL) -m 755 $(BUILD)/nblock $(DESTDIR)$(BINDIR)/nblock
	$(INSTALL) -m 644 include/nblock.h include/nblock.hpp $(DESTDIR)$(INCLUDEDIR)
	$(INSTALL) -m 644 $(BUILD)/libnblock.so $(DESTDIR)$(LIBDIR)/libnblock.so.$(VERSION)
	ln -sf libnblock.so.$(VERSION) $(DESTDIR)$(LIBDIR)/libnblock.so.0
	ln -sf libnblock.so.0 $(DESTDIR)$(LIBDIR)/libnblock.so
	$(INSTALL) -m 644 $(BUILD)/libnblock-install.a $(DESTDIR)$(LIBDIR)/libnblock.a
	$(FILL) packaging/nblock.pc.in >$(DESTDIR)$(PKGCONFIGDIR)/nblock.pc
	$(FILL) packaging/nblock-config.cmake.in >$(DESTDIR)$(CMAKEDIR)/nblock-config.cmake
	$(FILL) packaging/nblock-config-version.cmake.in >$(DESTDIR)$(CMAKEDIR)/nblock-config-version.cmake
	$(INSTALL) -m 644 packaging/tmpfiles.conf $(DESTDIR)$(TMPFILESDIR)/nblock.conf
	$(BUILD)/nblock manual >$(DESTDIR)$(DATADIR)/man/man1/nblock.1
	$(BUILD)/nblock completions bash >$(DESTDIR)$(DATADIR)/bash-completion/completions/nblock
	$(BUILD)/nblock completions zsh >$(DESTDIR)$(DATADIR)/zsh/site-functions/_nblock
	$(BUILD)/nblock completions fish >$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/nblock.fish
	@# The dynamic loader finds what is new in the directories it knows only after this.
	@if [ -z "$(DESTDIR)" ] && [ "$$(id -u)" -eq 0 ]; then ldconfig; fi

uninstall: ## removes what was installed, for the same PREFIX and DESTDIR
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))
	-rmdir $(DESTDIR)$(CMAKEDIR) 2>/dev/null
