"""Condensing instructions into a new token, among the model's own samples: method delia.

"DELIA", arXiv:2408.10841. Fine-tuning on a narrow task learns the surface of the task. Here N task
rows are mixed with r * N rows that the model itself wrote in answer to unrelated queries, so that
training does not bend everything towards the task. The loss is plain next-token cross-entropy on
the reply, for both sources. A new token such as <sep> stands in the task's prompts in place of a
format description; it is never a target and learns through the replies that attend to it.

    infer.py --method delia --self_sample    queries -> the model's own answers, the cache
    train.py --method delia                  task rows + r * task rows of the cache -> check_N
    infer.py --method delia, eval.py         does the token ask for the format where it should?

Rows are `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`.
They may start with a system turn and hold several exchanges; the last turn is learnt, the others
are its context.

Differences from the paper's code:
- Every new token is initialised (there: only the padding rows behind it) and has an embedding row
  of its own to learn, in the input embedding and, where that is another matrix, in the output
  embedding (`--token_train row`). `lora` is the published way: a low-rank update of the whole
  embedding, which moves all tokens.
- The end token is learnt; prompts are token ids with a generation prompt, and the reply is
  stripped, not cut by two characters.
- Samples that are truncated, empty, refusals or repeated are left out and counted, and a manifest
  says which model wrote them.
- Too few cached rows are an error, or repeated with `--oversample`; the realised ratio is printed
  and logged.
- One query in ten is never trained on, whatever the ratio, so that forgetting can be measured
  (`mixing.is_held_out`).
- A batch's loss is the mean over its rows of the mean over the reply's tokens, so that a batch of 4
  equals 4 accumulated batches of 1; there it is the mean over all tokens of a batch, which long
  replies dominate.
- `--mix stratified` spreads the task rows evenly; random batches of 64 at r = 260 hold no task row
  in 78 of 100 steps.
"""
