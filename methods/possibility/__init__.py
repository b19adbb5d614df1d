"""Possibility exploration fine-tuning: methods peft, otm, oto, and base (an untuned model).

"Possibility exploration fine-tuning", arXiv:2412.03343 (Interspeech 2025). The prompt asks for
possibility number #k. With numbers k_1..k_n drawn for the n replies of a context,

    L = L_MLE + ul_weight * L_UL
    L_MLE = mean of -log p(token | context, k_i)        over reply i, end token included
    L_UL  = mean of -log(1 - p(token | context, k_i))   over the content words of the replies j != i

so number k_i learns its own reply and unlearns the replies of the other numbers.

| method | replies per context | number in the prompt | unlikelihood |
| peft   | n                   | yes                  | yes          |
| otm    | n                   | no                   | no           |
| oto    | 1                   | no                   | no           |

Differences from the paper's code:
- The context is used as it is, once (a prompt tree), and whole batches are used; a batch's loss is
  the mean of its contexts' losses, so that a batch of 4 equals 4 accumulated batches of 1.
- Contexts are shuffled every epoch and numbers are drawn afresh; both depend on (seed, epoch, row)
  only.
- When something is too long, the oldest turns are dropped, never the reply.
- Likelihood starts at the first token of the reply (not one token early) and ends with the
  template's own end-of-turn token.
- Unlikelihood falls on the first token of every content word, found by character offsets, so that
  byte-level BPE and SentencePiece penalise the same words; stop words are scikit-learn's list.
- A reply equal to the right one is never a negative, and equal replies still get numbers of their
  own.
- If nothing is penalised, the unlikelihood is 0, not nan; rows with fewer replies than asked for
  are used.
- `--ul_words distinct` spares the words of a wrong reply that the right reply or the context has,
  too: unlearning the topic that all replies share costs coherence (README).
- A number without unlikelihood (`--no_ul --numbered_prompts`) and unlikelihood's reverse can be
  measured.
"""
