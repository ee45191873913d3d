//! Enums whose variants are words that leave the process: in SQL, in JSON, on the command line.
//!
//! One macro writes the enum and every way of spelling it, so that a word cannot differ between the database,
//! a message and an error text. The SQL enum of the same name is compared with [`ALL`](crate::JobState::ALL) by a test.

/// A word that is not one of those an enum knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is not a {what}; it has to be one of {known}")]
pub struct UnknownWord {
    /// What the word was read as, for people: "job state".
    pub what: &'static str,
    /// The word that nobody knows.
    pub word: String,
    /// The words that would have done, comma-separated.
    pub known: String,
}

/// Declares an enum of words: `enum Name: "sql_type", "what it is" { Variant = "word", … }`.
macro_rules! word_enum {
    ($(#[$meta:meta])* $name:ident: $sql:literal, $what:literal { $($(#[$vmeta:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize, sqlx::Type)]
        #[sqlx(type_name = $sql)]
        pub enum $name {
            $($(#[$vmeta])* #[serde(rename = $word)] #[sqlx(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every variant, in the order of the SQL enum.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// The name of the SQL enum with the same words.
            pub const SQL_TYPE: &'static str = $sql;

            /// The word for this variant, as SQL, JSON and the command line spell it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::words::UnknownWord;

            fn from_str(word: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|variant| variant.as_str() == word).ok_or_else(|| {
                    $crate::words::UnknownWord {
                        what: $what,
                        word: word.to_owned(),
                        known: Self::ALL.iter().map(|variant| variant.as_str()).collect::<Vec<_>>().join(", "),
                    }
                })
            }
        }
    };
}
pub(crate) use word_enum;
