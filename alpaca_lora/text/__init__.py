"""Words to token ids and back, shared by tuning and talking. Knows no model, no file of data and no tensor."""
