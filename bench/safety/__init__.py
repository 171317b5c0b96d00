"""Whether a guard guards: safety, over-refusal and utility of a model under it, beside what it costs."""
