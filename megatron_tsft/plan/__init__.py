"""What a run knows before Megatron starts: one frozen `Plan`, made by one list of checks, without
Megatron."""
