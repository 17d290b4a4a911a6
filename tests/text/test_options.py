"""The text options: defaults and descriptions."""

from alpaca_lora.text.options import TextOptions


def test_defaults_leave_the_choice_to_the_model() -> None:
    options = TextOptions()
    assert options.prompt_template_name is None and options.system_prompt is None
    assert all(field.description for field in TextOptions.model_fields.values())
