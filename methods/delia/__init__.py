"""Condensing instructions into a new token, among the model's own samples: method delia.

"DELIA", arXiv:2408.10841. Fine-tuning on a narrow task learns the surface of the task. Here N task rows are mixed with
r * N rows that the model itself wrote in answer to unrelated queries, so that what the task alone would bend is held in
place. The loss is plain next-token cross-entropy on the reply, for both sources. A new token such as <sep> stands in the
task's prompts in place of a format description; it is never a target and learns through the replies that look back at it.

    infer.py --method delia --self_sample    queries -> the model's own answers, the cache
    train.py --method delia                  task rows + diverse_ratio * task rows of the cache -> check_N
    infer.py --method delia, eval.py         does the token ask for the format, and only where it should?

Rows are `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`, maybe with a system
turn first and several exchanges; the last turn is learnt, the others are its context.

Differences from the paper's code:
- Every new id is initialised itself (there: only the padding rows behind it), and has a row of its own to learn, in the
  input embedding and, where that is another matrix, in the output embedding (`--token_train row`). `lora` is the
  published way: a low-rank update of the whole embedding, which moves all tokens.
- The end token is learnt; prompts are token ids with a generation prompt, and the reply is stripped, not cut by two characters.
- Own samples that are cut, empty, refusals or repeated are left out and counted, and a manifest says which model wrote them.
- Fewer cached rows than asked is an error, or `--oversample`; the realised ratio is printed and logged.
- One query in ten is never trained on, whatever the ratio, so that forgetting can be measured (`is_held_out`).
- A batch's loss is the mean over its rows of the mean over the reply's tokens, so that a batch of 4 equals 4 accumulated
  batches of 1; there it is the mean over all tokens of a batch, which long replies dominate.
- `--mix stratified` spreads the task rows evenly; random batches of 64 at r = 260 hold no task row in 78 of 100 steps.
"""

from methods.delia.flags import *  # noqa: F403
from methods.delia.inference import *  # noqa: F403
from methods.delia.messages import *  # noqa: F403
from methods.delia.mixing import *  # noqa: F403
from methods.delia.self_sampling import *  # noqa: F403
from methods.delia.training import *  # noqa: F403
