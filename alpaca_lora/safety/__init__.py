"""Input and output rails: a policy file of rules, checked in whole texts and in streams. Knows texts only."""
