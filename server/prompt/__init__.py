"""What is read off a prompt by the tokenizer and the chat template alone."""
