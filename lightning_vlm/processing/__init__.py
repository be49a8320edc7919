"""Conversation + pixels -> Sample: chat rendering, labels, image patches. One encoder per family."""
