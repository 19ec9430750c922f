//! Setters of data that crosses the contracts, named like the fields. Such a struct may get further fields,
//! so other crates make it by its constructor and by these.

/// Makes a setter for each field: `setters!(Type { field: FieldType })`, `setters!(<A> Type<A> { ... })`.
macro_rules! setters {
    (<$generic:tt> $of:ty { $($fields:tt)* }) => {
        impl<$generic> $of {
            setters!(@each $($fields)*);
        }
    };
    (@each $($field:ident: $type:ty),* $(,)?) => {
        $(
            #[doc = concat!("Sets the field `", stringify!($field), "`.")]
            #[must_use]
            pub fn $field(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*
    };
    ($of:ty { $($fields:tt)* }) => {
        impl $of {
            setters!(@each $($fields)*);
        }
    };
}
