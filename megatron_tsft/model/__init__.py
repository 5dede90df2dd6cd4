"""What touches a GPTModel, whichever loop runs it: loss hook, riding teacher, packed attention."""
