"""Selective prompt tuning: method spt.

"Selective Prompting Tuning for Personalized Conversations with LLMs", arXiv:2406.18187 (Findings of
ACL 2024). K soft prompts of V rows each over a frozen model, and a retriever that scores them
against persona and dialogue. With p_k the model's distribution under prompt k, s the scores,
h = softmax(s / tau_sim), and nll_k the mean negative log-probability of the reply under prompt k:

    L = w_lm L_LM + w_sel L_sel + w_fuse L_fuse + w_ctr L_ctr
    L_LM    mean of -log p_k(token) over all prompts and the tokens of the replies, end included
    L_sel   KL(softmax(-nll / tau_gold) || h): the model tells the retriever which prompt suits
    L_fuse  -log of the prompts' mixture, sum_k h_k p_k(token)
    L_ctr   scores of rows with similar personas are drawn together, others apart

The K prompts are also K ways to answer: `infer.py --soft_prompt all` draws one reply under each.

A soft prompt is a run of token ids above the vocabulary (modeling/softprompts.py). It stands before
the message, so the K runs of a row cannot share the message: they are the K trees of one packed
row, and only the replies' positions are scored. K = 1 with all weights but w_lm at 0 is plain
prompt tuning (Lester et al., arXiv:2104.08691).

Differences from the paper's code:
- The retriever sees persona and dialogue, without padding, in training as in inference; the code
  averages over padding and, in training, over the reply itself. Both sides are layer-normalised
  before the head.
- Raw context embeddings are nearly parallel (mean cosine 0.96 with SmolLM2), so one prompt would be
  chosen for every row. Fully centred ones hide that a prompt is good on average, and new people get
  what suits those of the training set least. So the retriever sees a context's deviation from the
  mean of the training contexts, plus half of that mean.
- Messages are in the tokenizer's own chat template, the same in training and inference; the end
  token is learnt; masks come from segments and not from matching tokens; the oldest turns go first
  when something is too long, the persona never.
- Fusion mixes probabilities (`--fusion logits_raw` is published: logits weighted by raw scores;
  logits_norm weights them by h).
- Noise on the selection target is added to its logits; on probabilities it can make them negative,
  and the loss nan.
- Similarity of personas is symmetric and cached; rows without a persona are compared by their
  dialogue.
- `--retriever_learning_rate`: prompts want a far larger rate than the matrix that chooses among
  them; published is one rate for both.
- `--prompt_init vocab` starts from random words instead of standard normal rows, which are far
  larger than words.
- Rows of one batch may use different prompts, so decoding does not run a batch once per prompt.
"""
