"""Generated retrieval tasks for language models: needles, associative recall and many-shot
classification."""
