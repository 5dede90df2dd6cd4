"""What touches a GPTModel, whichever loop runs it: output hook, loss reduction, riding teacher,
packed attention."""
