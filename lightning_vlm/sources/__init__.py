"""Where rows come from: files and tables of every kind, read by number, one normal form (Conversation) for all."""
