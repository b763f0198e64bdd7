# Every command a person or CI runs; bare `make` lists them.
#
# PYTHON=path        the Python 3.10+ that .venv is made from (default python3)
# PORT=...           the board's serial port; not needed when there is only one
# MICROPYTHON=path   a MicroPython unix port other than .venv's, for example the system's own package

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
MICROPYTHON ?= $(CURDIR)/.venv/bin/micropython
PY := .venv/bin/python
VENV := .venv/made-for

export PYTHON MICROPYTHON
export PYTHONDONTWRITEBYTECODE := 1

# Scripts in .venv carry its absolute path, so a moved or copied tree needs a new one.
ifneq ($(shell cat $(VENV) 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)
endif

.PHONY: help setup test test-cpython test-upy demo soak powercut bench-journal journal config check-config flash deploy watch pull-journal size lint package clean need-mosquitto need-micropython image picow bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(VENV) need-mosquitto need-micropython ## make .venv, install mosquitto if it is missing

test: $(VENV) need-mosquitto need-micropython ## every test, on CPython and on MicroPython: all that CI runs
	@$(PY) tests/run_all.py

test-cpython: $(VENV) need-mosquitto need-micropython ## the tests on CPython; ARGS= goes to pytest
	@$(PY) tests/run_all.py cpython $(ARGS)

test-upy: $(VENV) need-micropython ## the tests on the MicroPython unix port; ARGS="test_x.py test_y.py::test_z"
	@$(PY) tests/run_all.py upy $(ARGS)

demo: $(VENV) need-mosquitto need-micropython ## a device under power cuts and a real broker; N= CUTS= SEED= VERSION=5
	@$(PY) tools/demo.py $(if $(N),--messages $(N)) $(if $(CUTS),--cuts $(CUTS)) $(if $(SEED),--seed $(SEED)) $(if $(VERSION),--version $(VERSION))

soak: $(VENV) need-mosquitto need-micropython ## 100,000 messages each way, a bad link, the heap watched; N= SEED= VERSION=5
	@$(PY) tools/soak.py $(if $(N),--messages $(N)) $(if $(SEED),--seed $(SEED)) $(if $(VERSION),--version $(VERSION))

picow: $(VENV) need-mosquitto ## a Pico W's real firmware in an emulator, under power cuts; FIRMWARE=.uf2 N= CUTS= SEED=
	@$(PY) tools/picow.py $(if $(FIRMWARE),"$(FIRMWARE)") $(if $(N),--messages $(N)) $(if $(CUTS),--cuts $(CUTS)) $(if $(SEED),--seed $(SEED))

powercut: $(VENV) ## cut the power at every flash operation; ARGS= goes to tools/powercut.py
	@$(PY) tools/powercut.py $(ARGS)

bench: $(VENV) need-mosquitto need-micropython ## our client beside its peers; PEERS=dir ROUNDS= ARGS="PART ..."
	@$(PY) tools/bench_peers.py $(if $(PEERS),--peers $(PEERS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

bench-journal: $(VENV) need-micropython ## flash, CPU and heap the journal costs, beside littlefs; ARGS= names parts
	@$(PY) tools/bench_journal.py $(ARGS)

journal: $(VENV) ## dump, check or plot a journal: ARGS="dump FILE", "plot FILE -o OUT.svg", "check --port PORT"
	@$(PY) tools/journal.py $(or $(ARGS),--help)

config: $(VENV) ## make config.json by questions, or KEY=value such as wifi.ssid=home broker.host=10.0.0.2; asks the broker
	@$(PY) tools/configure.py --make $(if $(FILE),--file "$(FILE)")

check-config: $(VENV) ## whether config.json, or FILE=, is as the device wants it
	@$(PY) tools/configure.py --check $(if $(FILE),--file "$(FILE)")

flash: $(VENV) ## MicroPython onto a BOARD=esp32 or pico_w at PORT=; FIRMWARE=file, ERASE=1
	@$(PY) tools/flash.py $(if $(BOARD),--board $(BOARD)) $(if $(PORT),--port $(PORT)) \
		$(if $(FIRMWARE),--firmware "$(FIRMWARE)") $(if $(ERASE),--erase) $(if $(DRIVE),--drive "$(DRIVE)")

deploy: $(VENV) ## library, programs and config.json onto the board at PORT=, and start it; CONFIG=1 replaces its config.json
	@$(PY) tools/deploy.py $(if $(PORT),--port $(PORT)) $(if $(CONFIG),--config)

watch: $(VENV) ## the console of the board at PORT= with its statistics every EVERY= (10) seconds
	@$(PY) tools/watch.py $(if $(PORT),--port $(PORT)) $(if $(EVERY),--every $(EVERY))

pull-journal: $(VENV) ## stop the program of the board at PORT= and save its journal to FILE= (journal.bin)
	@$(PY) tools/journal.py pull "$(or $(FILE),journal.bin)" --port $(or $(PORT),auto)

image: $(VENV) ## one file per device, firmware and all: BOARD=esp32|pico_w [FIRMWARE=] [CONFIG=] [DEVICES=list.csv] [OUT=]
	@$(PY) tools/image.py $(or $(BOARD),$(error BOARD=esp32 or BOARD=pico_w is missing)) \
		$(if $(FIRMWARE),--firmware "$(FIRMWARE)") $(if $(CONFIG),--config "$(CONFIG)") \
		$(if $(DEVICES),--devices "$(DEVICES)") $(if $(OUT),--out "$(OUT)")

size: $(VENV) ## bytes of .mpy per module, and the change against the last release
	@$(PY) tools/size.py

lint: $(VENV) ## style and likely mistakes
	@$(PY) -m ruff check --no-cache .

package: ## write package.json from the files that are in lib/mqtt_durable
	@$(PYTHON) tools/package.py

clean: ## remove all that make has made, .venv too
	@rm -rf .venv .hypothesis .pytest_cache .ruff_cache build
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV): tools/requirements.txt
	@tools/setup venv

need-mosquitto:
	@tools/setup mosquitto

need-micropython: $(VENV)
	@tools/setup micropython
