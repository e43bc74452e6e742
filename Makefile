# Every target works from a bare clone; the environment is made when needed.
PYTHON ?= python3
BIN := .venv/bin
# Two workers share the cores, for notebooks and for tests, so each gets half of
# them. Two thread pools that compete for the same cores are several times slower.
THREADS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 2 ? n / 2 : 1 )))

# torch's profiler, which counts bytes for us, is chatty.
export KINETO_LOG_LEVEL := 99

.PHONY: help install run test exercises colab many lab demo picture distill \
  reinforce notebooks student fork clean

help:
	@echo "make run        the tour, on the bundled student: a table and a page"
	@echo "make test       notebooks clean and in sync, every notebook, tests/"
	@echo "make exercises  stubs fail, solutions pass, wrong solutions fail"
	@echo "make colab      every notebook with Colab's packages, as Colab opens it"
	@echo "make many       tests with four processes and two nodes (half an hour)"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make demo       the widget as a page of its own, on 127.0.0.1:8866"
	@echo "make picture    of the demo, for the tour"
	@echo "make distill    a teacher is trained and writes, the student learns from it"
	@echo "make reinforce  a beginner learns from verdicts, and is asked before and after"
	@echo "make install    only the environment (run and test make it too)"
	@echo "make notebooks  run the notebooks, keep their outputs, render README"
	@echo "make student    pre-train the student into _build/student (over an hour)"
	@echo "make fork TO=owner/name   a home of your own, in every link"
	@echo "make clean      remove the environment and everything built"

install: .venv/installed

.venv/installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "tiny_reason needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

run: install
	$(BIN)/python run_index.py

test: install
	$(BIN)/python -m pytest -q tests/test_sync.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/nbdev_test --path . --n_workers 2 --timing
	@echo "$$(ls index.ipynb nbs/*.ipynb nbs/lib/*.ipynb nbs/app/*.ipynb | wc -l) notebooks ran from top to bottom"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile \
	  --no-loadscope-reorder tests

exercises: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tests/exercises.py

# NB="nbs/04_demo.ipynb index.ipynb" runs these alone.
colab:
	$(PYTHON) tests/colab.py $(NB)

many: install
	$(BIN)/python -m pytest -q -rs -m many tests

lab: install
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=.

demo: install
	$(BIN)/voila nbs/app/page.ipynb --Voila.ip=127.0.0.1 --port=8866

# Of the demo, with the adapter that was trained last; Chromium is needed.
picture: install
	$(BIN)/python tests/picture.py outputs/student

# The teacher learns from written solutions; the student only from the teacher.
DISTILL := _build/distill
distill: install
	rm -rf $(DISTILL)
	$(BIN)/tiny_reason train --config student --output_dir $(DISTILL)/teacher
	$(BIN)/tiny_reason distill --config distill --input_file arithmetic \
	  --data.subset combined --limit 600 --k 2 --temperature 1 \
	  --teacher_model $(DISTILL)/teacher --output_file $(DISTILL)/traces.jsonl
	$(BIN)/tiny_reason train --config distill --output_dir $(DISTILL)/student \
	  --data.source $(DISTILL)/traces.kept.jsonl
	$(BIN)/tiny_reason evaluate --config $(DISTILL)/student/config.yaml

# Forty steps on written solutions, then attempts and verdicts.
REINFORCE := _build/verdicts
reinforce: install
	rm -rf $(REINFORCE)
	$(BIN)/tiny_reason train --config student --max_steps 40 \
	  --warmup_steps 10 --output_dir $(REINFORCE)/beginner
	$(BIN)/tiny_reason reinforce --start $(REINFORCE)/beginner \
	  --output_dir $(REINFORCE)/after
	$(BIN)/tiny_reason evaluate --config $(REINFORCE)/beginner/config.yaml
	$(BIN)/tiny_reason evaluate --config $(REINFORCE)/after/config.yaml
	$(BIN)/tiny_reason evaluate --compare $(REINFORCE)/after/tuned-think.jsonl \
	  $(REINFORCE)/beginner/tuned-think.jsonl

notebooks: install
	$(BIN)/python run_index.py $(filter-out nbs/app/page.ipynb,$(wildcard nbs/*.ipynb nbs/lib/*.ipynb nbs/app/*.ipynb)) index.ipynb
	$(BIN)/nbdev_clean --fname .
	$(BIN)/nbdev_export

student: install
	$(BIN)/python -c "from tiny_reason.pretrain import pretrain_student as p; p('_build/student')"

fork:
	$(PYTHON) tests/fork.py $(TO)

clean:
	rm -rf .venv _build build dist outputs *.egg-info
