"""Operations on images that know nothing of messages or settings."""
